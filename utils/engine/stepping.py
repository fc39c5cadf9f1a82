"""What both engines do the same way: counts and losses of a step, the optimizer, the schedule, precision."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from model.structures import ADAM_BETAS, DTYPES, GRADIENT_CLIP, WEIGHT_DECAY
from utils.cli.errors import UserError
from utils.data.collate import Batch

STEP, MICRO_BATCH = "step", "micro_batch"
LOSS_NORMALISATIONS = (STEP, MICRO_BATCH)
ADAMW, SGD = "adamw", "sgd"


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up to `peak`, then down to 0 at `total_steps` ("constant": stays)."""

    peak: float
    total_steps: int
    warmup_steps: int = 0
    kind: str = "linear"

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0. Step 0 already moves: it takes 1 / warmup_steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        left = max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))
        if self.kind == "cosine":
            return self.peak * 0.5 * (1.0 - math.cos(math.pi * left))
        return self.peak * left


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, and what it is given.

    name: ADAMW, or SGD without momentum. multipliers: prefix of parameter names -> times the learning rate (the first
    that fits). loss_normalisation: losses are divided by the
    counts of the whole "step", or (release, docs/facts.md, L1) each micro-batch's by its own, and the micro-batches
    averaged: "micro_batch".
    """

    betas: tuple[float, float] = ADAM_BETAS
    weight_decay: float = WEIGHT_DECAY
    gradient_clip: float = GRADIENT_CLIP
    multipliers: Mapping[str, float] | None = None
    loss_normalisation: str = STEP
    name: str = ADAMW


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, of which a rank may hold a part only."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has, of which a rank may hold a part only."""
    return math.prod(full_shape(parameter))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """The trainable parameters in groups of equal decay and multiplier, as optimizers take them.

    Only tensors of two or more axes decay. A group carries its `multiplier`; its `lr` is set before each step.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable_parameters(model).items():
        fitting = (m for prefix, m in (settings.multipliers or {}).items() if name.startswith(prefix))
        decay = settings.weight_decay if len(full_shape(parameter)) >= 2 else 0.0
        groups.setdefault((decay, next(fitting, 1.0)), []).append(parameter)
    if not groups:
        raise UserError("nothing is left to train: LoRA is off and every part is frozen")
    return [
        {"params": found, "weight_decay": decay, "multiplier": multiplier}
        for (decay, multiplier), found in groups.items()
    ]


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer over exactly the trainable parameters."""
    groups = parameter_groups(model, settings)
    if settings.name == SGD:
        return torch.optim.SGD(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group `rate` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]


def to_precision(model: nn.Module, precision: str) -> None:
    """Frozen matrices in the precision's type, everything that trains (and frozen vectors: norms, biases) in float32.

    Buffers stay as they are: rotary frequencies and random Fourier features lose what they are for in 16 bits.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                low = not parameter.requires_grad and len(full_shape(parameter)) >= 2
                wanted = DTYPES[precision] if low else torch.float32
                parameter.data = parameter.data.to(wanted)
                if (part := getattr(parameter, "ds_tensor", None)) is not None:  # ZeRO-3 keeps a rank's part here
                    part.data = part.data.to(wanted)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward runs."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def count_step(
    model: Any, micro_batches: Sequence[Batch], add: Callable[[list[float]], list[float]]
) -> dict[str, float]:
    """Counts of every loss over the whole step. `add` sums a list of numbers over all ranks, item by item.

    Counted from labels and masks alone: `as_kwargs` would normalise every image on the CPU for nothing.
    """
    names = sorted(model.loss_weights)
    counted = [model.count_losses(**batch.counted()) for batch in micro_batches]
    return dict(zip(names, add([sum(float(c.get(name, 0.0)) for c in counted) for name in names]), strict=True))


def loss_divisors(
    losses: Mapping[str, Any], counts: Mapping[str, float], micro_batches: int, normalisation: str
) -> Mapping[str, float]:
    """What `weighted_loss` divides this micro-batch's losses by, so that the shares of a step add up to its loss.

    counts: of the whole step. micro_batches: how many the step has over all ranks. normalisation: see
    `OptimizerSettings`.
    """
    if normalisation == STEP:
        return counts
    return {name: max(float(term.count), 1.0) * micro_batches for name, term in losses.items()}


def weighted_loss(losses: Mapping[str, Any], weights: Mapping[str, float], counts: Mapping[str, float]) -> torch.Tensor:
    """This micro-batch's share of the step's loss: sum over names of weight * sum / count of the whole step.

    A loss nobody has a target for adds its sum of zero, so that the graph still reaches every parameter.
    """
    return torch.stack(
        [weights[name] * term.sum.float() / max(counts[name], 1.0) for name, term in losses.items()]
    ).sum()


class LossSums:
    """Sums of the losses over a step's micro-batches, kept on the device until the end."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.values = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def add(self, losses: Mapping[str, Any]) -> None:
        """Add one micro-batch's sums."""
        zero = self.values.new_zeros(())
        self.values += torch.stack([losses[n].sum.detach().double() if n in losses else zero for n in self.names])

    def means(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Mean by name; 0 where nothing was counted."""
        return {
            name: value / max(counts[name], 1.0) for name, value in zip(self.names, self.values.tolist(), strict=True)
        }


@contextmanager
def evaluation_mode(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Evaluation mode, no gradients, the run's precision; the mode before comes back, errors or not."""
    was_training = model.training
    model.eval()
    try:
        # Tables that are in parts are put together once, not for every token.
        with torch.no_grad(), parametrize.cached(), autocast(device, precision):
            yield
    finally:
        model.train(was_training)

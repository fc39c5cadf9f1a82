"""Before training: does every parameter that should train get a gradient, and no other?"""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils.cli.errors import UserError
from utils.data.collate import Batch
from utils.engine.stepping import autocast, weighted_loss

logger = logging.getLogger(__name__)

LONGEST_SEARCH = 256  # batches


class GradientError(UserError):
    """What gets a gradient is not what should train."""


def find_probe_batch(model: Any, batches: Iterable[Batch], wanted: Sequence[str]) -> Batch:
    """The first batch in which every loss named in `wanted` has something to count; GradientError when none does."""
    seen: dict[str, float] = {}
    for batch in islice(batches, LONGEST_SEARCH):
        counts = model.count_losses(**batch.counted())
        if all(counts.get(name, 0.0) > 0 for name in wanted):
            return batch
        seen = {name: seen.get(name, 0.0) + float(counts.get(name, 0.0)) for name in wanted}
    never = [name for name in wanted if not seen.get(name)]
    raise GradientError(
        f"none of the first {LONGEST_SEARCH} batches has something to learn for the loss of "
        f"{', '.join(never or wanted)}: mix in data with answers and targets, "
        "or freeze what cannot learn (--no-train_mask_decoder)"
    )


def probe_gradients(
    model: nn.Module, batch: Batch, expected: Iterable[str], precision: str, device: torch.device
) -> int:
    """Run `batch` forward and backward once and compare who got a gradient with who should.

    Returns the operations that took, in matrix products and convolutions.

    A gradient of exact zeros passes only for LoRA's A while its B is zero. The model, its mode and the random state are
    as before afterwards.

    Args:
        expected: names of the parameters that train.

    Raises:
        GradientError: names the parameters, and says what is wrong with them.
    """
    expected = set(expected)
    parameters = dict(model.named_parameters())
    _compare_flags(parameters, expected)
    flops = _check_counts_and_run(model, batch, precision, device)
    try:
        missing = [name for name in sorted(expected) if parameters[name].grad is None]
        frozen = [name for name, parameter in parameters.items() if name not in expected and parameter.grad is not None]
        zero = [name for name in sorted(expected) if name not in missing and _is_dead(name, parameters)]
        infinite = [name for name in sorted(expected) if name not in missing and not _is_finite(parameters[name])]
    finally:
        model.zero_grad(set_to_none=True)
    _refuse(missing, "should train but no gradient reaches it: freeze it or connect it to a loss")
    _refuse(frozen, "should be frozen but gets a gradient")
    _refuse(zero, "should train but its gradient is exactly zero: it cannot learn")
    _refuse(infinite, "gets a gradient that is not finite: look at the weights it was loaded from and at --precision")
    return flops


def log_gradients(model: nn.Module) -> None:
    """Say how much trains, once `probe_gradients` has found that all of it does."""
    trains = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    share = f"{sum(trains):,} of {total:,} numbers"
    logger.info(f"gradients reach all of the {len(trains)} tensors that train ({share}), and no other")


def _compare_flags(parameters: dict[str, nn.Parameter], expected: set[str]) -> None:
    _refuse(sorted(expected - parameters.keys()), "should train but is no parameter of this model")
    _refuse(
        [n for n, p in parameters.items() if p.requires_grad and n not in expected],
        "should be frozen but is set to train",
    )
    _refuse([n for n, p in parameters.items() if not p.requires_grad and n in expected], "should train but is frozen")


def _check_counts_and_run(model: Any, batch: Batch, precision: str, device: torch.device) -> int:
    """Forward and backward; the counts that the step is divided by must be those that forward reports.

    Returns the operations, without those that activations take to be computed again.
    """
    counts = dict(model.count_losses(**batch.counted()))
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices), FlopCounterMode(display=False) as counter:
            with autocast(device, precision):
                losses = model(**batch.to(device).as_kwargs()).losses
            forward = counter.get_total_flops()
            weighted_loss(losses, model.loss_weights, counts).backward()
    finally:
        model.train(was_training)
    # What the backward pass computes again does not count as work; nearly all of the forward pass is computed again.
    again = forward if getattr(model, "is_activation_checkpointing", False) else 0
    reported = {name: float(term.count) for name, term in losses.items()}
    if any(reported[name] != counts.get(name, 0.0) for name in reported):
        raise GradientError(
            f"the model counts its losses as {counts} before a step but as {reported} in it: it cannot be normalised"
        )
    return counter.get_total_flops() - again


def _is_dead(name: str, parameters: dict[str, nn.Parameter]) -> bool:
    gradient = parameters[name].grad
    if gradient is None or not gradient.numel() or bool(gradient.any()):
        return False
    partner = parameters.get(name.replace(".lora_A.", ".lora_B.")) if ".lora_A." in name else None
    return partner is None or bool(partner.any())


def _is_finite(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


def _refuse(names: list[str], problem: str) -> None:
    if names:
        more = (
            f" (and {len(names) - 1} more: {', '.join(names[1:4])}{' …' if len(names) > 4 else ''})"
            if len(names) > 1
            else ""
        )
        raise GradientError(f"parameter {names[0]!r} {problem}{more}")

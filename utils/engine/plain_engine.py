"""The plain engine: one process, PyTorch and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.engine.checkpoints import point_to, require_tag, writing
from utils.engine.protocol import StepReport, TrainingBatch
from utils.engine.stepping import (
    LossSums,
    OptimizerSettings,
    autocast,
    count_step,
    evaluation_mode,
    make_optimizer,
    set_learning_rate,
    shared_counts,
    to_precision,
    trainable_parameters,
    weighted_loss,
)
from utils.scripts import UserError

WEIGHTS, STATE = "pytorch_model.bin", "training_state.pt"


class PlainEngine:
    """One process on one device. See `protocol.Engine`.

    Frozen matrices are kept in the run's precision; what trains is kept, and stepped, in float32.
    """

    name = "plain"
    rank = 0
    world_size = 1
    shards_weights = False

    def __init__(self, model: nn.Module, settings: OptimizerSettings, precision: str, device: torch.device) -> None:
        to_precision(model, precision)
        self.model: Any = model.to(device)
        self.device, self.precision, self.settings = device, precision, settings
        self.optimizer = make_optimizer(model, settings)
        self.parameters = list(trainable_parameters(model).values())
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def train_step(self, micro_batches: list[TrainingBatch], learning_rate: float) -> StepReport:
        """See `protocol.Engine.train_step`."""
        losses, counts = self.accumulate(micro_batches)
        norm, applied = self._apply(learning_rate)
        total = sum(self.model.loss_weights[name] * value for name, value in losses.items())
        return StepReport(losses, total, counts, learning_rate, norm, applied)

    def accumulate(self, micro_batches: list[TrainingBatch]) -> tuple[dict[str, float], dict[str, float]]:
        """Add the whole step's gradient to the parameters; returns the means and counts of the losses."""
        weights = self.model.loss_weights
        counts = count_step(self.model, micro_batches, lambda numbers: numbers)
        sums = LossSums(list(counts), self.device)
        for batch in micro_batches:
            with autocast(self.device, self.precision):
                losses = self.model(**batch.to(self.device).as_kwargs()).losses
            divisors = shared_counts(losses, counts, len(micro_batches), self.settings.loss_normalisation)
            self.scaler.scale(weighted_loss(losses, weights, divisors)).backward()
            sums.add(losses)
        return sums.means(counts), counts

    def _apply(self, learning_rate: float) -> tuple[float, bool]:
        """Clip and step; returns the norm before clipping and whether the step was taken."""
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.gradient_clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        set_learning_rate(self.optimizer, learning_rate)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, self.scaler.get_scale() >= scale

    @contextmanager
    def inference(self) -> Iterator[None]:
        """See `protocol.Engine.inference`."""
        with evaluation_mode(self.model, self.device, self.precision):
            yield

    def gather(self, value: Any) -> list[Any]:
        """See `protocol.Engine.gather`."""
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nobody to leave."""

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """See `protocol.Engine.save`. The weights, frozen ones included, are a file that merging reads as it is."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "client": client_state}
        with writing(folder / tag):
            (folder / tag).mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), folder / tag / WEIGHTS)
            torch.save(state, folder / tag / STATE)
            point_to(folder, tag)

    def load(self, folder: Path) -> dict[str, Any]:
        """See `protocol.Engine.load`."""
        place = folder / require_tag(folder)
        if not (place / STATE).is_file():
            raise UserError(
                f"{place} was not written by the plain engine: go on with --engine deepspeed, or leave --resume out"
            )
        weights = torch.load(place / WEIGHTS, map_location="cpu", weights_only=True)
        state = torch.load(place / STATE, map_location="cpu", weights_only=True)
        try:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[:2]
            raise UserError(
                f"the checkpoint {place} does not fit this model ({' '.join(' '.join(first).split())}): "
                "use the flags it was trained with, or another --exp_name"
            ) from None
        self.scaler.load_state_dict(state["scaler"])
        return state["client"]

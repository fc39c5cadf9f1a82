"""What the two engines have in common, and what one optimizer step reports."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.losses import LossTerm
from utils.data.collate import Batch
from utils.engine.process_group import ProcessGroup, explain_lost_peer
from utils.engine.stepping import LossSums, OptimizerSettings, count_step, loss_divisors, weighted_loss
from utils.engine.throughput import StepTimer


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, over all ranks and micro-batches.

    losses: by name, unweighted means. total: their weighted sum. counts: what each mean was taken over.
    gradient_norm: before clipping. applied: False where the gradient was not finite and the step was skipped.
    seconds: what this rank spent on what, by name (see `throughput.StepTimer`).
    """

    losses: dict[str, float]
    total: float
    counts: dict[str, float]
    learning_rate: float
    gradient_norm: float
    applied: bool = True
    seconds: Mapping[str, float] = field(default_factory=dict)


class Engine(ProcessGroup, ABC):
    """One optimizer step at a time, on one process or on many. All ranks call every method together.

    model: `model(**batch.as_kwargs()).losses` maps a name to a `LossTerm`, whose sum is connected to every trainable
    parameter even when there is nothing to sum; `loss_weights` and `count_losses` are PixelLM's.
    """

    name: str
    model: Any

    def __init__(self, settings: OptimizerSettings, precision: str, device: torch.device) -> None:
        super().__init__(device)
        self.settings, self.precision, self.timer = settings, precision, StepTimer(device)

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepReport:
        """Forward and backward over this rank's `micro_batches`, then one optimizer step at `learning_rate`.

        The gradient is that of sum over names of weight * (sum over the whole step) / (count over the whole step), so
        it does not depend on how the step's samples were cut into ranks and micro-batches.
        """
        with explain_lost_peer():
            losses, counts = self.accumulate(micro_batches)
            with self.timer("optimizer"):
                norm, applied = self.update(learning_rate)
        total = sum(self.model.loss_weights[name] * value for name, value in losses.items())
        return StepReport(losses, total, counts, learning_rate, norm, applied, self.timer.read())

    def accumulate(self, micro_batches: list[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """Add the whole step's gradient to the parameters; returns the means and counts of the losses."""
        with self.timer("communication"):
            counts = count_step(self.model, micro_batches, self.add)
        sums, everywhere = LossSums(list(counts), self.device), self.world_size * len(micro_batches)
        for number, batch in enumerate(micro_batches, start=1):
            with self.timer("forward"):
                losses = self.forward(batch)
            divisors = loss_divisors(losses, counts, everywhere, self.settings.loss_normalisation)
            with self.timer("backward"):
                loss = weighted_loss(losses, self.model.loss_weights, divisors)
                self.backward(loss, is_last=number == len(micro_batches))
            sums.add(losses)
        with self.timer("communication"):
            self.sum(sums.values)
        return sums.means(counts), counts

    @abstractmethod
    def forward(self, batch: Batch) -> Mapping[str, LossTerm]:
        """The losses of a micro-batch, by name."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradient of this rank's share of the step's loss. is_last: of the step's micro-batches."""

    @abstractmethod
    def update(self, learning_rate: float) -> tuple[float, bool]:
        """Clip and step; returns the gradient's norm before clipping and whether the step was taken.

        A gradient that is not finite is thrown away: it would leave nothing of the weights, nor of the moments.
        """

    @abstractmethod
    def inference(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients, in the run's precision; training mode comes back at the end.

        Inside, every rank has the whole model and may use it by itself.
        """

    @abstractmethod
    def save(self, place: Path, client_state: dict[str, Any]) -> None:
        """Write model, optimizer and `client_state` into the existing, empty folder `place`."""

    @abstractmethod
    def load(self, place: Path) -> dict[str, Any]:
        """Read what `save` wrote into model and optimizer; returns the client state.

        Raises UserError when it does not fit.
        """

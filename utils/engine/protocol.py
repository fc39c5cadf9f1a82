"""What the loop needs from an engine, what an engine needs from a model and a batch, and what one step reports."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

B = TypeVar("B", bound="TrainingBatch")


class TrainingBatch(Protocol):
    """Tensors of one micro-batch under the names of the model's forward arguments."""

    def to(self: B, device: torch.device, dtype: torch.dtype | None = None) -> B:
        """A copy on `device`, its floating-point tensors as `dtype` where given."""

    def as_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""

    def counted(self) -> dict[str, Any]:
        """Those of them that losses are counted from: no image is touched."""


class TrainableModel(Protocol):
    """A model whose forward returns sums and counts, by name, and leaves the division to the engine.

    `model(**batch.as_kwargs()).losses` maps a name to an object with `sum` (a tensor connected to every trainable
    parameter, even when there is nothing to sum) and `count`.
    """

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weight of each loss by name."""

    def count_losses(self, **targets: Any) -> Mapping[str, float]:
        """The counts that forward would return for a batch with these targets, without running the model."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, over all ranks and accumulation rounds.

    losses: by name, unweighted means. total: their weighted sum. counts: what each mean was taken over.
    gradient_norm: before clipping. applied: False where the gradient was not finite and the step was left out.
    seconds: what this rank spent on what, by name (see `costs.StepClock`).
    """

    losses: dict[str, float]
    total: float
    counts: dict[str, float]
    learning_rate: float
    gradient_norm: float
    applied: bool = True
    seconds: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """One optimizer step at a time, on one process or on many. All ranks call every method together."""

    name: str
    rank: int
    world_size: int
    device: torch.device
    model: Any

    def train_step(self, micro_batches: list[Any], learning_rate: float) -> StepReport:
        """Forward and backward over this rank's `micro_batches`, then one optimizer step at `learning_rate`.

        The gradient is that of sum over names of weight * (sum over the whole step) / (count over the whole step), so
        it does not depend on how the step's samples were cut into ranks, rounds and micro-batches.
        """

    def inference(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients, in the run's precision; training mode comes back at the end.

        Inside, every rank has the whole model and may use it by itself.
        """

    def add(self, numbers: list[float]) -> list[float]:
        """Sums of a list of numbers over all ranks, item by item."""

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Wait for the other processes and leave them: the last call, but not after an error, when nobody may come."""

    def save(self, place: Path, client_state: dict[str, Any]) -> None:
        """Write model, optimizer and `client_state` into the folder `place`, which is there and empty."""

    def load(self, place: Path) -> dict[str, Any]:
        """Read what `save` wrote into model and optimizer; returns the client state.

        Raises UserError when it does not fit.
        """

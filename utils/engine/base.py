"""What the two engines have in common, and what one optimizer step reports."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.data.collate import Batch
from utils.engine.process_group import ProcessGroup


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

    @abstractmethod
    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepReport:
        """Forward and backward over this rank's `micro_batches`, then one optimizer step at `learning_rate`.

        The gradient is that of sum over names of weight * (sum over the whole step) / (count over the whole step), so
        it does not depend on how the step's samples were cut into ranks and micro-batches.
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

"""The plain engine: PyTorch and nothing else, in one process or in several that add up their gradients."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from model.losses import LossTerm
from utils.cli.errors import UserError
from utils.data.collate import Batch
from utils.engine.base import Engine
from utils.engine.stepping import (
    OptimizerSettings,
    autocast,
    evaluation_mode,
    make_optimizer,
    set_learning_rate,
    to_precision,
    trainable_parameters,
)

WEIGHTS, STATE = "pytorch_model.bin", "training_state.pt"


class PlainEngine(Engine):
    """A whole model on every rank.

    Frozen matrices are kept in the run's precision; what trains is kept, and stepped, in float32. Ranks start from the
    weights of the first one; where torch.distributed was not initialised there is one.
    """

    name = "plain"

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        precision: str,
        device: torch.device,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """
        Args:
            optimizer: one over the trainable parameters of `model`, in the groups of `parameter_groups`; by default the
                one that `settings` name.
        """
        super().__init__(settings, precision, device)
        to_precision(model, precision)
        self.model: Any = model.to(device)
        self.optimizer = optimizer or make_optimizer(model, settings)
        self.parameters = list(trainable_parameters(model).values())
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        if self.world_size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def accumulate(self, micro_batches: list[Batch]) -> tuple[dict[str, float], dict[str, float]]:
        """See `Engine.accumulate`."""
        found = super().accumulate(micro_batches)
        with self.timer("communication"):
            self._sum_gradients()
        return found

    def forward(self, batch: Batch) -> Mapping[str, LossTerm]:
        """See `Engine.forward`."""
        with autocast(self.device, self.precision):
            return self.model(**batch.to(self.device).as_kwargs()).losses

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """See `Engine.backward`."""
        self.scaler.scale(loss).backward()

    def _sum_gradients(self) -> None:
        """Over all ranks, in one message. A parameter that no loss reached on this rank adds zeros.

        torch's DistributedDataParallel orders its buckets anew after the first step, so that with more than two ranks
        a resumed run adds up in another order than one that went through.
        """
        if self.world_size == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        vector_to_parameters(self.sum(parameters_to_vector(gradients)), gradients)

    def update(self, learning_rate: float) -> tuple[float, bool]:
        """See `Engine.update`."""
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.gradient_clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        set_learning_rate(self.optimizer, learning_rate)
        applied = math.isfinite(norm)
        if applied or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    @contextmanager
    def inference(self) -> Iterator[None]:
        """See `Engine.inference`."""
        with evaluation_mode(self.model, self.device, self.precision):
            yield

    def save(self, place: Path, client_state: dict[str, Any]) -> None:
        """See `Engine.save`. The weights, frozen ones included, are a file that merging reads as it is."""
        if self.rank != 0:
            return
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "client": client_state}
        torch.save(self.model.state_dict(), place / WEIGHTS)
        torch.save(state, place / STATE)

    def load(self, place: Path) -> dict[str, Any]:
        """See `Engine.load`."""
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

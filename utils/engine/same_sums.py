"""One order of sums whatever the ZeRO stage, so that equal trainings leave equal bits.

Floating-point sums depend on their order, and stage 3 has one of its own in four places. Its hooks put a node before
whatever goes into or comes out of a module, where autograd first adds up the gradients of the module's own uses of a
tensor; without them it adds one use after the other. Its linear layers add the bias to a product that is already
rounded, which shows in bfloat16. It adds up ranks in every round, stages 0 and 1 once, after the last. And it takes the
gradient's norm in float64. Here is what gives the other stages the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn

from utils.engine.process_group import Peers


class _Node(torch.autograd.Function):
    """The same numbers in the same memory. (A view would have strides of its own along axes of one, after which torch
    picks another convolution.)"""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def sum_as_stage_3(model: nn.Module) -> None:
    """Put a node where stage 3 has one: before and behind every module, for all tensors that are handed over by place,
    those in lists, tuples and dictionaries included. And take its linear layers, in the whole process, as it does."""
    torch.nn.functional.linear = zero3_linear_wrap
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, inputs: _through_nodes(inputs))
        module.register_forward_hook(lambda _, __, output: _through_nodes(output))


def _through_nodes(value: Any) -> Any:
    """`value` with a node of its own behind every tensor; a dictionary is changed in place, as stage 3 does."""
    if isinstance(value, torch.Tensor):
        return _Node.apply(value) if value.requires_grad and torch.is_grad_enabled() else value
    if isinstance(value, (tuple, list)):
        parts = [_through_nodes(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        for key in value:
            value[key] = _through_nodes(value[key])
    return value


def norm_of(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of all `gradients` together, a float64 scalar: a float32 one would show in which order it was summed."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)


def clip(gradients: Sequence[torch.Tensor], limit: float, norm: float) -> None:
    """Scale down in place to norm `limit`, by the formula of stages 1 to 3. norm: theirs before."""
    scale = 1.0 / max((norm + 1e-6) / limit, 1.0)
    for gradient in gradients:
        gradient.mul_(scale)


def take_norm_in_double(optimizer: Any, everyone: Peers) -> None:
    """Let DeepSpeed's optimizer of stage 1 or 2 take its norm as stage 3 does; its own rounds each group's to float32.

    Where gradients rest on the CPU (offload) it keeps its own way.
    """
    if optimizer.cpu_offload:
        return

    def scaled_global_norm(norm_type: float = 2) -> torch.Tensor:
        parts = [part for group in optimizer.averaged_gradients.values() for part in group or ()]
        squared = norm_of(parts).to(everyone.device).square()
        return everyone.sum(squared).sqrt()

    optimizer.scaled_global_norm = scaled_global_norm


class SummedRounds:
    """Gradients of a step's earlier rounds, each added up over ranks as soon as it was made."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.earlier: dict[nn.Parameter, torch.Tensor] = {}

    def add(self, last: bool) -> None:
        """Take this round's gradients off the parameters; after the `last` put the sum there."""
        for parameter in self.parameters:
            if (earlier := self.earlier.pop(parameter, None)) is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad.add_(earlier)
            if not last and parameter.grad is not None:
                self.earlier[parameter] = parameter.grad
                parameter.grad = None

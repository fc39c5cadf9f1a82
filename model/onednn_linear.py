"""Linear layers on a CPU, through the library that is quickest at them: those of answers, and those that are frozen.

torch hands float32 products to MKL, which reads weights slowly for one row and takes several times as long for a few.
On two cores of a Zen 4 a layer of 32,008 x 768 took 8.4 ms for one row and 20 for four; through oneDNN it took 3.3 and
6.4 (reading it takes 2.1), and 300 rows through one of 2,048 x 768 took 12 ms instead of 16. One row through a compiled
loop takes another tenth less. In a training step 362 rows, there and back, took a tenth to a fifth less. Results differ
in their last digits only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

# What torch's own compiler writes for linear layers on a CPU.
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Smaller weights stay in the processor's cache, and calling from Python costs more than there is to gain.
SMALLEST_WEIGHT = 2**17

RowKernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(in,) inputs and (out, in) weight -> (out,)."""


class _Quickest(TorchFunctionMode):
    """Inside, `F.linear` of float32 rows goes to oneDNN, that of one row to `kernel` where there is one; all else goes
    its way.
    """

    def __init__(self, kernel: RowKernel | None) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and not kwargs and _whole(*args):
            inputs, weight, bias = (*args, None)[:3]
            if self._kernel is not None and inputs.numel() == inputs.shape[-1]:
                row = self._kernel(inputs.flatten(), weight).view(*inputs.shape[:-1], -1)
                return row if bias is None else row + bias
            return _linear(inputs, weight, bias)
        return func(*args, **(kwargs or {}))


def _whole(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    whole = inputs.dtype == weight.dtype == torch.float32 and weight.is_contiguous()
    return whole and inputs.dim() > 1 and inputs.numel() > 0


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def quick_linear(device: torch.device, kernel: RowKernel | None = None) -> AbstractContextManager[Any]:
    """Inside, on a CPU and without gradients, linear layers go the quickest way. It is for this thread alone."""
    return _Quickest(kernel) if suits(device) and not torch.is_grad_enabled() else nullcontext()


def suits(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether layers of this type on this device go another way inside `quick_linear`."""
    return AVAILABLE and device.type == "cpu" and dtype == torch.float32


def one_row(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A `RowKernel`, to be compiled."""
    return (weight * inputs).sum(dim=-1)


class FrozenLinear(nn.Linear):
    """A linear layer whose weight and bias do not train, in a model that does; made by `quicken_frozen`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, out), as `nn.Linear`."""
        if not self._may_be_quick(input):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            return _FrozenProduct.apply(input, self.weight, self.bias)
        return _linear(input, self.weight, self.bias)

    def _may_be_quick(self, inputs: torch.Tensor) -> bool:
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        elsewhere = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or hasattr(self.weight, "ds_id")
        # A sharded run, which cannot go this way, shall then leave the same bits.
        elsewhere = elsewhere or torch.are_deterministic_algorithms_enabled()
        return not trains and not elsewhere and suits(self.weight.device) and _whole(inputs, self.weight)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(gradients[0], weight.t()), None, None


def quicken_frozen(model: nn.Module) -> int:
    """Let large linear layers that do not train go the quickest way, there and back. Returns how many there are.

    Layers that train later, or are sharded, or sit on another device, go on as before.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and not layer.weight.requires_grad and layer.weight.numel() >= SMALLEST_WEIGHT
    ]
    for layer in layers:
        layer.__class__ = FrozenLinear
    return len(layers)

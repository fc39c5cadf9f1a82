"""Linear layers in float32 on a CPU through oneDNN: in answering, and frozen ones in training.

torch hands float32 products to MKL, which is slow at the few vectors that decode a token. Results differ in their last
digits only.
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

VectorKernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(in,) inputs and (out, in) weight -> (out,)."""


class _LinearThroughOneDNN(TorchFunctionMode):
    """Inside, `F.linear` in float32 goes to oneDNN, or for a single vector to `kernel` where there is one."""

    def __init__(self, kernel: VectorKernel | None) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and not kwargs and _is_eligible(*args):
            inputs, weight, bias = (*args, None)[:3]
            if self._kernel is not None and inputs.numel() == inputs.shape[-1]:
                product = self._kernel(inputs.flatten(), weight).view(*inputs.shape[:-1], -1)
                return product if bias is None else product + bias
            return _linear(inputs, weight, bias)
        return func(*args, **(kwargs or {}))


def _is_eligible(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    plain = inputs.dtype == weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and inputs.dim() > 1 and inputs.numel() > 0


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def onednn_linear(device: torch.device, kernel: VectorKernel | None = None) -> AbstractContextManager[Any]:
    """Inside, on a CPU and without gradients, linear layers go through oneDNN; in this thread alone."""
    return _LinearThroughOneDNN(kernel) if is_supported(device) and not torch.is_grad_enabled() else nullcontext()


def is_supported(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether layers of this type on this device go through oneDNN inside `onednn_linear`."""
    return AVAILABLE and device.type == "cpu" and dtype == torch.float32


def multiply_vector(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A `VectorKernel`, to be compiled."""
    return (weight * inputs).sum(dim=-1)


class FrozenLinear(nn.Linear):
    """A linear layer whose weight and bias do not train, in a model that does; made by `use_onednn`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, out), as `nn.Linear`."""
        if not self._may_use_onednn(input):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            return _FrozenProduct.apply(input, self.weight, self.bias)
        return _linear(input, self.weight, self.bias)

    def _may_use_onednn(self, inputs: torch.Tensor) -> bool:
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        elsewhere = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or hasattr(self.weight, "ds_id")
        # A sharded run, which cannot use it, leaves the same bits then.
        elsewhere = elsewhere or torch.are_deterministic_algorithms_enabled()
        return not trains and not elsewhere and is_supported(self.weight.device) and _is_eligible(inputs, self.weight)


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


def use_onednn(model: nn.Module) -> int:
    """Let large linear layers that do not train use oneDNN, forward and backward. Returns how many there are.

    Layers that train later, or are sharded, or lie on another device, go on as before.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and not layer.weight.requires_grad and layer.weight.numel() >= SMALLEST_WEIGHT
    ]
    for layer in layers:
        layer.__class__ = FrozenLinear
    return len(layers)

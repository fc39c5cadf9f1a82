"""Linear layers of answers on a CPU, through the library that is quickest at them.

torch hands float32 products to MKL, which reads weights slowly for one row and takes several times as long for a few.
On two cores of a Zen 4 a layer of 32,008 x 768 took 8.4 ms for one row and 20 for four; through oneDNN it took 3.3 and
6.4 (reading it takes 2.1), and 300 rows through one of 2,048 x 768 took 12 ms instead of 16. One row through a compiled
loop takes another tenth less. Results differ in their last digits only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# What torch's own compiler writes for linear layers on a CPU.
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
            return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _whole(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    whole = inputs.dtype == weight.dtype == torch.float32 and weight.is_contiguous()
    return whole and inputs.dim() > 1 and inputs.numel() > 0


def quick_linear(device: torch.device, kernel: RowKernel | None = None) -> AbstractContextManager[Any]:
    """Inside, on a CPU and without gradients, linear layers go the quickest way. It is for this thread alone."""
    return _Quickest(kernel) if suits(device) and not torch.is_grad_enabled() else nullcontext()


def suits(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether layers of this type on this device go another way inside `quick_linear`."""
    return AVAILABLE and device.type == "cpu" and dtype == torch.float32


def one_row(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A `RowKernel`, to be compiled."""
    return (weight * inputs).sum(dim=-1)

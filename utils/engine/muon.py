"""Muon for hidden matrices, AdamW for everything else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch

# The quintic of the Newton-Schulz iteration, chosen to be steep at 0: singular values end between about 0.7 and 1.2.
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
# An update's entries get the root mean square that AdamW's have in practice, so that both take one learning rate.
ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Groups with `muon` true hold matrices, whose momentum is made orthogonal before it is subtracted (K. Jordan 2024;
    scaled as in arXiv 2502.16982); the others are AdamW's. In float32 throughout: 16 bits are slow on a CPU.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0})
        rest = [group for group in self.param_groups if not group["muon"]]
        self._rest = torch.optim.AdamW(rest, lr=0.0, betas=betas, fused=True) if rest else None
        if self._rest is not None:
            # One set of groups and of states: what is set, saved or loaded here holds for both.
            for ours, theirs in zip(rest, self._rest.param_groups, strict=True):
                ours.update(theirs)
            self._share()

    def _share(self) -> None:
        if self._rest is not None:
            self._rest.param_groups = [group for group in self.param_groups if not group["muon"]]
            self._rest.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything that has a gradient."""
        result = closure() if closure is not None else None
        if self._rest is not None:
            self._rest.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in by_shape.items():
            updates = orthogonal(torch.stack([self._momentum(matrix) for matrix in matrices]))
            rate = group["lr"] * ADAMW_RMS * max(shape) ** 0.5
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=rate)

    def _momentum(self, matrix: torch.Tensor) -> torch.Tensor:
        """Nesterov's: the gradient, on its way to the running mean that it has just entered."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the nearest semi-orthogonal matrices, roughly: their singular values come near 1."""
    a, b, c = QUINTIC
    upright = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if upright else matrices
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.mT if upright else found

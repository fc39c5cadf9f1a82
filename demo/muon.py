"""Muon for hidden matrices, AdamW for everything else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.engine.stepping import OptimizerSettings, parameter_groups

# The quintic of the Newton-Schulz iteration, chosen to be steep at 0: singular values end between about 0.7 and 1.2.
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
# An update's entries get the root mean square that AdamW's have in practice, so that both take one learning rate.
ADAMW_RMS = 0.2


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers between other layers: neither a table of words nor the head that scores them."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return {module.weight for module in linear if isinstance(module.weight, nn.Parameter)}


def make_muon(model: nn.Module, settings: OptimizerSettings) -> "Muon":
    """Muon over the trainable parameters of `model`, in groups as `parameter_groups` makes them."""
    matrices = hidden_matrices(model)
    groups = []
    for group in parameter_groups(model, settings):
        for muon in (False, True):
            if members := [parameter for parameter in group["params"] if (parameter in matrices) == muon]:
                groups.append({**group, "params": members, "muon": muon})
    return Muon(groups, betas=settings.betas)


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
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        updates = shared_out([self._momentum(matrix) for matrix in matrices])
        for matrix, update in zip(matrices, updates, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.sub_(update, alpha=group["lr"] * ADAMW_RMS * max(matrix.shape) ** 0.5)

    def _momentum(self, matrix: torch.Tensor) -> torch.Tensor:
        """Nesterov's: the gradient, on its way to the running mean that it has just entered."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)


def shared_out(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonal` of each, every rank doing its share; all ranks hold the same matrices, and get the same results."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _orthogonal_of_all(matrices)
    ranks, own = dist.get_world_size(), dist.get_rank()
    shares = [matrices[rank::ranks] for rank in range(ranks)]
    sizes = [sum(matrix.numel() for matrix in share) for share in shares]
    sent = matrices[0].new_zeros(max(sizes))
    torch.cat([found.flatten() for found in _orthogonal_of_all(shares[own])], out=sent[: sizes[own]])
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent)
    results: list[torch.Tensor] = [sent] * len(matrices)
    for rank, share in enumerate(shares):
        parts = received[rank][: sizes[rank]].split([matrix.numel() for matrix in share])
        results[rank::ranks] = [part.view_as(matrix) for part, matrix in zip(parts, share, strict=True)]
    return results


def _orthogonal_of_all(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonal` of each; those of one shape go together."""
    results = list(matrices)
    for shape in dict.fromkeys(matrix.shape for matrix in matrices):
        members = [index for index, matrix in enumerate(matrices) if matrix.shape == shape]
        for index, found in zip(members, orthogonal(torch.stack([matrices[i] for i in members])), strict=True):
            results[index] = found
    return results


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the nearest semi-orthogonal matrices, roughly: their singular values come near 1.

    Every round is a polynomial in the Gram matrix of the shorter side, so that the long side is met only at both ends.
    """
    upright = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if upright else matrices
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram = found @ found.mT
    factor = step = _quintic(gram)
    for _ in range(ROUNDS - 1):
        gram = step @ gram @ step
        step = _quintic(gram)
        factor = step @ factor
    found = factor @ found
    return found.mT if upright else found


def _quintic(gram: torch.Tensor) -> torch.Tensor:
    """What a matrix with this Gram matrix is multiplied with in one round."""
    a, b, c = QUINTIC
    step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    step.diagonal(dim1=-2, dim2=-1).add_(a)
    return step

"""One-to-one matching of predicted and true masks by BCE + DICE at sampled points (docs/facts.md, V1).

Axes: P predicted masks, G true masks, N points, H W pixels.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional


def _sample(masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(M, H, W) at points (N, 2) of (x, y) in [0, 1] -> (M, N), bilinear, zero outside."""
    grid = (2.0 * points - 1.0).expand(len(masks), 1, -1, -1)
    return functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0, 0]


def matching_cost(logits: np.ndarray, targets: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Cost of every pair, float32 (P, G): mean BCE over the points + DICE with 1 added to both its sides.

    logits (P, H, W) raw; targets (G, H, W) of 0 and 1; points (N, 2) of (x, y) in [0, 1], shared by all masks.
    """
    if len(logits) == 0 or len(targets) == 0:
        return np.zeros((len(logits), len(targets)), dtype=np.float32)
    at = torch.as_tensor(points, dtype=torch.float32)
    predicted = _sample(torch.as_tensor(logits, dtype=torch.float32), at)
    true = _sample(torch.as_tensor(targets, dtype=torch.float32), at)
    positive = functional.softplus(-predicted) @ true.T
    negative = functional.softplus(predicted) @ (1.0 - true).T
    bce = (positive + negative) / len(at)
    probability = predicted.sigmoid()
    shared = probability @ true.T
    dice = 1.0 - (2.0 * shared + 1.0) / (probability.sum(-1)[:, None] + true.sum(-1)[None] + 1.0)
    return (bce + dice).numpy()


def match(cost: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest one-to-one pairs of a cost matrix (P, G): (row, column), rows rising, min(P, G) of them."""
    rows, columns = linear_sum_assignment(cost)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]

"""Intervals by the bootstrap, with images as the units: questions about one image are not independent.

Every score here is a sum of numerators over a sum of denominators: gIoU is IoUs over questions, cIoU intersections over
unions, an accuracy rights over questions. So an image is a row of sums, and a draw only counts how often each row
was taken.
"""

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000
SEED = 20231204
LEVEL = 0.95

# Draws times images that are counted at once; bounds the memory.
_AT_ONCE = 1 << 22

Interval = tuple[float, float]


def resampled_sums(rows: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """(N, K) -> (draws, K) float64: sums over N rows taken with replacement, the same rows for all K columns."""
    units = len(rows)
    rng = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // units)
    parts = []
    for start in range(0, draws, step):
        count = min(step, draws - start)
        taken = rng.integers(0, units, (count, units)) + units * np.arange(count)[:, None]
        times = np.bincount(taken.ravel(), minlength=count * units).reshape(count, units)
        parts.append(times.astype(np.float64) @ rows)
    return np.concatenate(parts)


def ratio_intervals(
    numerators: np.ndarray, denominators: np.ndarray, *, draws: int = DRAWS, seed: int = SEED, level: float = LEVEL
) -> list[Interval]:
    """(low, high) percentiles of K scores, each a sum of its numerators over that of its denominators.

    numerators, denominators: (N, K), a row per image. A draw whose denominators sum to 0 scores 1, as `Overlap.iou`
    does. The same seed gives the same intervals. ValueError without images.
    """
    if len(numerators) == 0 or numerators.shape != denominators.shape:
        raise ValueError(
            f"found numerators {numerators.shape} and denominators {denominators.shape}; expected the same "
            "(images, scores) with at least one image"
        )
    columns = numerators.shape[1]
    sums = resampled_sums(np.concatenate([numerators, denominators], axis=1).astype(np.float64), draws, seed)
    above, below = sums[:, :columns], sums[:, columns:]
    scores = np.divide(above, below, out=np.ones_like(above), where=below != 0)
    tail = (1 - level) / 2
    low, high = np.quantile(scores, [tail, 1 - tail], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def by_unit(units: Sequence[str], values: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Values (M, K) summed over those of the same unit -> (N, K) float64, units in order of their names."""
    _, number = np.unique(np.asarray(units), return_inverse=True)
    table = np.asarray(values, dtype=np.float64)
    sums = np.zeros((int(number.max()) + 1, table.shape[1]))
    np.add.at(sums, number, table)
    return sums

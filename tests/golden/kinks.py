"""ReLU inputs so close to zero that rounding decides their side.

On either side the output is the same, the gradient is not: a single such input moved recorded gradient norms by 0.7 %.
A reference that rounded the other way is right too, so a test may look at both sides.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import combinations, islice
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

WIDTH = 1e-5  # a few times the rounding seen in activations of size 1 to 10
MOST_CHOICES = 16


class Kink(NamedTuple):
    """The `call`-th ReLU of a forward, and the place in its flattened input."""

    call: int
    place: int


@contextmanager
def watch(flipped: Collection[Kink] = ()) -> Iterator[list[Kink]]:
    """Collect the kinks that a forward inside the block comes by; those in `flipped` are mirrored at zero."""
    relu = functional.relu
    near: list[Kink] = []
    calls = iter(range(1 << 30))

    def watched(states: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        call = next(calls)
        values = states.detach().flatten()
        near.extend(Kink(call, int(place)) for place in (values.abs() < WIDTH).nonzero())
        mirror = torch.zeros_like(values)
        for kink in flipped:
            if kink.call == call:
                mirror[kink.place] = -2 * values[kink.place]
        return relu(states + mirror.view_as(states), inplace=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "relu", watched)
        yield near


def choices(near: list[Kink]) -> Iterator[tuple[Kink, ...]]:
    """Sets of kinks to flip, small ones first, not more than are worth a forward each."""
    sets = (chosen for size in range(1, len(near) + 1) for chosen in combinations(near, size))
    return islice(sets, MOST_CHOICES)

"""Matching of masks at sampled points."""

import itertools
import math

import numpy as np
import pytest

from utils.evaluation.matching import match, matching_cost


def test_cost_of_constant_masks_is_its_formula() -> None:
    points = np.random.default_rng(0).random((50, 2), dtype=np.float32) * 0.5 + 0.25
    cost = matching_cost(np.full((1, 6, 6), 2.0), np.stack([np.ones((6, 6)), np.zeros((6, 6))]), points)
    p = 1 / (1 + math.exp(-2.0))
    against_one = -math.log(p) + 1 - (2 * 50 * p + 1) / (50 * p + 50 + 1)
    against_zero = -math.log(1 - p) + 1 - 1 / (50 * p + 1)
    assert cost[0] == pytest.approx([against_one, against_zero], rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_nothing_matches_nothing(shape: tuple[int, int]) -> None:
    cost = matching_cost(np.zeros((shape[0], 4, 4)), np.zeros((shape[1], 4, 4)), np.zeros((3, 2)))
    assert cost.shape == shape
    assert match(cost) == []


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)])
def test_match_is_the_cheapest_of_all_assignments(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(1).random(shape)
    tall = cost if shape[0] >= shape[1] else cost.T
    rows = itertools.permutations(range(tall.shape[0]), tall.shape[1])
    best = min(sum(tall[row, column] for column, row in enumerate(choice)) for choice in rows)
    pairs = match(cost)
    assert sum(cost[pair] for pair in pairs) == pytest.approx(best)
    assert len(pairs) == min(shape)

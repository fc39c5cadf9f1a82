"""Bootstrap intervals: against scipy's, against arithmetic, and in time."""

import time

import numpy as np
import pytest
from scipy import stats

from utils.evaluation import bootstrap


def test_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(3)
    unions = rng.integers(1, 50, 200).astype(float)
    intersections = np.floor(unions * rng.random(200))
    ours = bootstrap.ratio_intervals(intersections[:, None], unions[:, None])[0]

    def ciou(above: np.ndarray, below: np.ndarray, axis: int) -> np.ndarray:
        return above.sum(axis=axis) / below.sum(axis=axis)

    theirs = stats.bootstrap(
        (intersections, unions), ciou, paired=True, n_resamples=bootstrap.DRAWS, method="percentile", batch=1000,
        rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert ours[0] < intersections.sum() / unions.sum() < ours[1]


def test_images_are_the_units() -> None:
    # One image of ten right questions and one of ten wrong ones: a draw of two images scores 0, 1/2 or 1.
    units = ["a"] * 10 + ["b"] * 10
    sums = bootstrap.by_unit(units, [(1.0, 1.0)] * 10 + [(0.0, 1.0)] * 10)
    assert sums.tolist() == [[10, 10], [0, 10]]
    assert bootstrap.ratio_intervals(sums[:, :1], sums[:, 1:]) == [(0.0, 1.0)]


def test_without_doubt_the_interval_is_a_point() -> None:
    assert bootstrap.ratio_intervals(np.full((7, 1), 3.0), np.full((7, 1), 4.0)) == [(0.75, 0.75)]
    assert bootstrap.ratio_intervals(np.zeros((2, 1)), np.zeros((2, 1))) == [(1.0, 1.0)]


def test_the_seed_decides_and_columns_share_their_draws() -> None:
    rows = np.random.default_rng(0).random((30, 1))
    ones = np.ones_like(rows)
    first, second = bootstrap.ratio_intervals(np.hstack([rows, rows]), np.hstack([ones, ones]))
    assert first == pytest.approx(second, rel=1e-12)
    assert first == pytest.approx(bootstrap.ratio_intervals(rows, ones)[0], rel=1e-12)
    assert first != bootstrap.ratio_intervals(rows, ones, seed=1)[0]


def test_ten_thousand_draws_of_a_thousand_images_take_seconds() -> None:
    rows = np.random.default_rng(0).random((1000, 4))
    start = time.process_time()
    bootstrap.ratio_intervals(rows, np.ones_like(rows))
    assert time.process_time() - start < 5


def test_nothing_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap.ratio_intervals(np.zeros((0, 1)), np.zeros((0, 1)))

"""Thresholds are compared the right way round, what is missing is named, and a miss is said in a sentence."""

import json
import math
from pathlib import Path

import pytest

from utils.cli.atomic_files import write_json
from utils.evaluation.thresholds import Threshold, compare, format_table, list_misses

SCORES = {"giou": 0.78, "n": 1000, "giou_by_kind": {"direct": 0.849}, "baselines": {"everything": 0.40}, "name": "x"}


def test_thresholds_hold_at_their_value_where_they_say_so() -> None:
    thresholds = [
        Threshold("giou", ">=", 0.78),
        Threshold("n", ">=", 1000),
        Threshold("giou_by_kind.direct", ">=", 0.85),
        Threshold("baselines.everything", "<", 0.40),
        Threshold("baselines.everything", "<=", 0.40),
    ]
    rows = compare(SCORES, thresholds)
    assert [row.reached for row in rows] == [True, True, False, False, True]
    assert list_misses(rows) == [
        "giou_by_kind.direct is 0.8490, not >= 0.8500",
        "baselines.everything is 0.4000, not < 0.4000",
    ]


def test_a_score_without_a_threshold_is_shown_and_nan_reaches_nothing() -> None:
    assert compare({"giou": 0.5}, ["giou"])[0].reached is None
    rows = compare({"giou": math.nan}, [Threshold("giou", ">=", 0.0)])
    assert list_misses(rows)


@pytest.mark.parametrize("path", ["absent", "giou_by_kind.absent", "giou_by_kind", "name", "giou.deeper"])
def test_what_is_not_there_is_named(path: str) -> None:
    with pytest.raises(KeyError, match=path):
        compare(SCORES, [Threshold(path, ">=", 0)])


def test_the_table_has_a_line_for_every_row() -> None:
    lines = format_table(compare(SCORES, ["n", Threshold("giou_by_kind.direct", ">=", 0.85)])).splitlines()
    assert lines[0].split() == ["n", "1,000"]
    assert lines[1].split() == ["giou_by_kind.direct", "0.849", ">=", "0.850", "MISSED"]


def test_json_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "summary.json"
    write_json(target, SCORES)
    with pytest.raises(TypeError):
        write_json(target, {"not json": object()})
    assert json.loads(target.read_text()) == SCORES

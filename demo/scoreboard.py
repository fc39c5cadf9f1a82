"""Scores against bars: which must be reached, which were, and the table that says so."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RELATIONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Bar:
    """`path` (dots go into nested scores) must stand in `relation` (">=", "<=" or "<") to `value`."""

    path: str
    relation: str
    value: float


Bars = tuple[str | Bar, ...]
"""What a table shows in order: paths, and bars on them."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `reached` is None where there is no bar."""

    path: str
    score: float
    bar: Bar | None
    reached: bool | None


def look_up(scores: Mapping[str, Any], path: str) -> float:
    """The number at a dotted path. KeyError names the path when it is not there or no number."""
    found: Any = scores
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise KeyError(f"there is no number {path!r} in the scores, found {found!r}")
    return float(found)


def compare(scores: Mapping[str, Any], shown: Sequence[str | Bar]) -> list[Row]:
    """A row for each of `shown`: a path is only shown, a Bar must be reached. NaN reaches nothing."""
    rows = []
    for item in shown:
        if isinstance(item, Bar):
            score = look_up(scores, item.path)
            rows.append(Row(item.path, score, item, RELATIONS[item.relation](score, item.value)))
        else:
            rows.append(Row(item, look_up(scores, item), None, None))
    return rows


def missed(rows: Sequence[Row]) -> list[str]:
    """A sentence for every bar that was not reached."""
    return [
        f"{row.path} is {_number(row.score, 4)}, not {row.bar.relation} {_number(row.bar.value, 4)}"
        for row in rows
        if row.bar is not None and not row.reached
    ]


def table(rows: Sequence[Row], with_bars: bool = True) -> str:
    """The rows as text in columns; without bars just names and scores."""
    width = max(len(row.path) for row in rows)
    lines = []
    for row in rows:
        line = f"  {row.path:<{width}}  {_number(row.score):>8}"
        if with_bars and row.bar is not None:
            line += f"   {row.bar.relation:>2} {_number(row.bar.value):<7} {'reached' if row.reached else 'MISSED'}"
        lines.append(line)
    return "\n".join(lines)


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) > 1 and value == int(value) else f"{value:.{digits}f}"

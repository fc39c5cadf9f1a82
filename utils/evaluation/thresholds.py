"""Measured numbers against thresholds: which must be reached, which were, and the table that says so."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RELATIONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Threshold:
    """`path` (dots go into nested numbers) must stand in `relation` (">=", "<=" or "<") to `value`."""

    path: str
    relation: str
    value: float


Expectations = Sequence[str | Threshold]
"""What a table shows in order: paths, and thresholds on them."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `reached` is None where there is no threshold."""

    path: str
    found: float
    threshold: Threshold | None
    reached: bool | None


def look_up(numbers: Mapping[str, Any], path: str) -> float:
    """The number at a dotted path. KeyError names the path when it is not there or no number."""
    found: Any = numbers
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise KeyError(f"there is no number {path!r} in the results, found {found!r}")
    return float(found)


def compare(numbers: Mapping[str, Any], expected: Expectations) -> list[Row]:
    """A row for each of `expected`: a path is only shown, a Threshold must be reached. NaN reaches nothing."""
    rows = []
    for item in expected:
        if isinstance(item, Threshold):
            found = look_up(numbers, item.path)
            rows.append(Row(item.path, found, item, RELATIONS[item.relation](found, item.value)))
        else:
            rows.append(Row(item, look_up(numbers, item), None, None))
    return rows


def list_misses(rows: Sequence[Row]) -> list[str]:
    """A sentence for every threshold that was not reached."""
    return [
        f"{row.path} is {_format(row.found, 4)}, not {row.threshold.relation} {_format(row.threshold.value, 4)}"
        for row in rows
        if row.threshold is not None and not row.reached
    ]


def format_table(rows: Sequence[Row], with_thresholds: bool = True) -> str:
    """The rows as text in columns; without thresholds just names and numbers."""
    width = max(len(row.path) for row in rows)
    lines = []
    for row in rows:
        line = f"  {row.path:<{width}}  {_format(row.found):>8}"
        if with_thresholds and row.threshold is not None:
            verdict = "reached" if row.reached else "MISSED"
            line += f"   {row.threshold.relation:>2} {_format(row.threshold.value):<7} {verdict}"
        lines.append(line)
    return "\n".join(lines)


def _format(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) > 1 and value == int(value) else f"{value:.{digits}f}"

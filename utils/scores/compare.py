"""Two results folders side by side: paired differences with intervals, and the answers that changed most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.scores import bootstrap
from utils.scores.lines import read_lines
from utils.scores.tables import columns
from utils.scripts import UserError

MOST_CHANGED = 20

# Key of a line's IoU -> name of the gIoU it belongs to.
_IOUS = {"iou": "free", "iou_teacher_forced": "teacher"}

Line = Mapping[str, Any]
Pair = tuple[Line, Line]


@dataclass(frozen=True)
class Difference:
    """gIoU of B minus gIoU of A over the questions that both scored, with its 95% interval; pictures are the units."""

    protocol: str
    group: str
    n: int
    first: float
    second: float
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        """In [-1, 1]; above 0 where B is better."""
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """differences: over all questions, by data set and by kind. changed: the lines (A, B) whose IoU changed most,
    free-running where both have that. only_first, only_second: how many lines are in one folder alone."""

    differences: list[Difference]
    changed: list[Pair]
    only_first: int
    only_second: int


def compare(first: Sequence[Line], second: Sequence[Line], most: int = MOST_CHANGED) -> Comparison:
    """Compare the lines of two runs by their ids. UserError when they share no question, or share an id but not its
    question: then the data sets differ."""
    a, b = ({line["id"]: line for line in lines} for lines in (first, second))
    shared = [(a[key], b[key]) for key in sorted(a.keys() & b.keys())]
    if not shared:
        raise UserError("the two results share no question: compare runs over the same --val_dataset")
    for one, other in shared:
        if one["question"] != other["question"]:
            raise UserError(
                f"{one['id']} asks {one['question']!r} in the first results and {other['question']!r} in the second: "
                "they are of different data, score both on the same"
            )
    differences = []
    for key, protocol in _IOUS.items():
        pairs = [pair for pair in shared if all(line.get(key) is not None for line in pair)]
        if pairs:
            differences += [_difference(protocol, name, group, key) for name, group in _groups(pairs).items()]
    if not differences:
        raise UserError("the two results have no protocol in common: score both with the same --protocol")
    key = next(key for key, protocol in _IOUS.items() if protocol == differences[0].protocol)
    both = [pair for pair in shared if all(line.get(key) is not None for line in pair)]
    moved = sorted((pair for pair in both if change(pair)), key=lambda pair: (-abs(change(pair)), pair[0]["id"]))
    return Comparison(differences, moved[:most], len(a) - len(shared), len(b) - len(shared))


def change(pair: Pair) -> float:
    """IoU of B minus IoU of A, free-running where both have that, else with the answer given."""
    for key in _IOUS:
        if all(line.get(key) is not None for line in pair):
            return float(pair[1][key] - pair[0][key])
    return 0.0


def _groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = {"all": list(pairs)}
    for name in ("dataset", "kind"):
        values = sorted({pair[0][name] for pair in pairs})
        for value in values if len(values) > 1 else []:
            groups[f"{name} {value}"] = [pair for pair in pairs if pair[0][name] == value]
    return groups


def _difference(protocol: str, group: str, pairs: Sequence[Pair], key: str) -> Difference:
    sums = bootstrap.by_unit(
        [one["image_path"] for one, _ in pairs], [(other[key] - one[key], 1.0) for one, other in pairs]
    )
    (interval,) = bootstrap.ratio_intervals(sums[:, :1], sums[:, 1:])
    first, second = (sum(pair[side][key] for pair in pairs) / len(pairs) for side in (0, 1))
    return Difference(protocol, group, len(pairs), first, second, interval)


def compare_folders(first: Path, second: Path) -> str:
    """What `compare` finds in two results folders, for a person."""
    found = compare(read_lines(first), read_lines(second))
    rows = [["protocol, questions", "n", "gIoU A", "gIoU B", "B - A", "95% interval"]]
    rows += [
        [
            f"{one.protocol}, {one.group}",
            str(one.n),
            f"{one.first:.4f}",
            f"{one.second:.4f}",
            f"{one.value:+.4f}",
            f"[{one.interval[0]:+.4f}, {one.interval[1]:+.4f}]",
        ]
        for one in found.differences
    ]
    said = [f"A: {first}", f"B: {second}", columns(rows)]
    if found.only_first or found.only_second:
        said.append(f"left out: {found.only_first} questions of A alone, {found.only_second} of B alone")
    said.append(f"changed most, {len(found.changed)} questions:" if found.changed else "no question's IoU changed")
    for pair in found.changed:
        one, other = pair
        said.append(f"  {change(pair):+.3f}  {one['id']}  {_on_one_line(one['question'])}")
        said += [f"          {name}: {_on_one_line(line['answer'])}" for name, line in (("A", one), ("B", other))]
    return "\n".join(said)


def _on_one_line(text: str, most: int = 160) -> str:
    shown = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return shown if len(shown) <= most else shown[: most - 1] + "…"

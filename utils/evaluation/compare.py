"""Two results folders side by side: paired differences with intervals, and the answers that changed most.

Scores of masks and of words are compared, so that what training on masks cost in words is seen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli.errors import UserError
from utils.data.samples import TEXT
from utils.evaluation import bootstrap, text_quality
from utils.evaluation import html_report as pages
from utils.evaluation.records import read_lines
from utils.evaluation.tables import columns

MOST_CHANGED = 20

# Key of a line's IoU -> name of the gIoU it belongs to.
_IOUS = {"iou": "free", "iou_teacher_forced": "teacher"}

Line = Mapping[str, Any]
Pair = tuple[Line, Line]
Ratio = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A score of B minus that of A over the questions that both scored, with its 95% interval (None where it has none);
    images are the units. n: questions."""

    score: str
    group: str
    n: int
    first: float
    second: float
    interval: tuple[float, float] | None

    @property
    def value(self) -> float:
        """Above 0 where B's score is higher."""
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """differences: over all questions, by data set and by kind, then those of answers in words. changed: the lines
    (A, B) whose IoU changed most, free-running where both have that. only_first, only_second: how many lines are in one
    folder alone. notes: what could not be compared."""

    differences: list[Difference]
    changed: list[Pair]
    only_first: int
    only_second: int
    notes: tuple[str, ...] = ()


def compare(first: Sequence[Line], second: Sequence[Line], most: int = MOST_CHANGED) -> Comparison:
    """Compare the lines of two runs by their data sets and ids. UserError when they share no question, or share an id
    but not its question: then the data sets differ."""
    a, b = ({(line["dataset"], line["id"]): line for line in lines} for lines in (first, second))
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
            found = ((f"{protocol} gIoU, {name}", group) for name, group in _groups(pairs).items())
            differences += [_difference(name, "", group, _share(key)) for name, group in found]
    in_words, notes = _differences_in_words([pair for pair in shared if pair[0]["kind"] == TEXT])
    differences += in_words
    if not differences:
        raise UserError("the two results have no protocol in common: score both with the same --protocol")
    moved = sorted((pair for pair in shared if change(pair)), key=lambda pair: (-abs(change(pair)), pair[0]["id"]))
    return Comparison(differences, moved[:most], len(a) - len(shared), len(b) - len(shared), notes)


def change(pair: Pair) -> float:
    """IoU of B minus IoU of A, free-running where both have that, else with the answer given."""
    for key in _IOUS:
        if all(line.get(key) is not None for line in pair):
            return float(pair[1][key] - pair[0][key])
    return 0.0


def _share(key: str) -> Callable[[Line], Ratio]:
    return lambda line: (float(line[key]), 1.0)


def _differences_in_words(pairs: Sequence[Pair]) -> tuple[list[Difference], tuple[str, ...]]:
    """Differences of the scores in words, and what could not be compared."""

    def both(key: str) -> list[Pair]:
        return [pair for pair in pairs if all(line.get(key) is not None for line in pair)]

    found, notes = [], []
    for key in ("exact_match", "vqa_accuracy"):
        if group := both(key):
            found.append(_difference(key.replace("_", " "), TEXT, group, _share(key)))
    if said := both("answer"):
        references = [(line["true_answer"], *line["references"]) for line, _ in said]
        first, second = (
            text_quality.bleu([pair[side]["answer"] for pair in said], references) or 0.0 for side in (0, 1)
        )
        found.append(Difference("BLEU", TEXT, len(said), first, second, None))
    if read := both("nll"):
        if all(one["num_tokens"] == other["num_tokens"] for one, other in read):
            nll = _difference("-ln p per token", TEXT, read, lambda line: (line["nll"], line["num_tokens"]))
            found.append(nll)
            first, second = math.exp(nll.first), math.exp(nll.second)
            found.append(Difference("perplexity", TEXT, len(read), first, second, None))
        else:
            notes.append("perplexities: not compared, the two models split the true answers into different tokens")
    return found, tuple(notes)


def _groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = {"all": list(pairs)}
    for name in ("dataset", "kind"):
        values = sorted({pair[0][name] for pair in pairs})
        for value in values if len(values) > 1 else []:
            groups[f"{name} {value}"] = [pair for pair in pairs if pair[0][name] == value]
    return groups


def _difference(score: str, group: str, pairs: Sequence[Pair], ratio: Callable[[Line], Ratio]) -> Difference:
    """The denominators of both lines of a pair are the same."""
    parts = [(ratio(one), ratio(other)) for one, other in pairs]
    sums = bootstrap.by_unit(
        [one["image_path"] for one, _ in pairs], [(other[0] - one[0], one[1]) for one, other in parts]
    )
    (interval,) = bootstrap.ratio_intervals(sums[:, :1], sums[:, 1:])
    below = sum(one[1] for one, _ in parts)
    first, second = (sum(part[side][0] for part in parts) / below for side in (0, 1))
    return Difference(score, group, len(pairs), first, second, interval)


def compare_folders(first: Path, second: Path, out: Path | None = None) -> str:
    """What `compare` finds in two results folders, for a person. out: a folder for a page of the answers that changed
    most."""
    found = compare(read_lines(first), read_lines(second))
    rows = [["score, questions", "n", "A", "B", "B - A", "95% interval"]]
    rows += [
        [
            ", ".join(filter(None, (one.score, one.group))),
            str(one.n),
            f"{one.first:.4f}",
            f"{one.second:.4f}",
            f"{one.value:+.4f}",
            f"[{one.interval[0]:+.4f}, {one.interval[1]:+.4f}]" if one.interval else "-",
        ]
        for one in found.differences
    ]
    said = [f"A: {first}", f"B: {second}", columns(rows), *found.notes]
    if found.only_first or found.only_second:
        said.append(f"left out: {found.only_first} questions of A alone, {found.only_second} of B alone")
    said.append(f"changed most, {len(found.changed)} questions:" if found.changed else "no question's IoU changed")
    for pair in found.changed:
        one, other = pair
        said.append(f"  {change(pair):+.3f}  {one['id']}  {_on_one_line(one['question'])}")
        said += [f"          {name}: {_on_one_line(line['answer'])}" for name, line in (("A", one), ("B", other))]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        title = f"What changed most: A {first}, B {second}"
        pages.write_comparison(out / pages.COMPARISON, title, found.changed)
        said.append(f"written to {out}: {pages.COMPARISON}")
    return "\n".join(said)


def _on_one_line(text: str, most: int = 160) -> str:
    shown = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return shown if len(shown) <= most else shown[: most - 1] + "…"

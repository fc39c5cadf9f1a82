"""What is said about a data set, on a terminal and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.data.required_files import MissingPath

MISSING, BROKEN, LEFT_OUT, HARMLESS = "missing", "broken", "left out", "harmless"
LEVELS = (MISSING, BROKEN, LEFT_OUT, HARMLESS)
"""missing and broken: put it right. left out: training does without it, and counts it. harmless: good to know."""

PUBLISHED = {"llava_instruct_150k": "about 150,000 (its name)", "llava_v1_5_mix665k": "about 665,000 (its name)"}
"""How much a data set holds according to those who published it, where that is known."""

_COLOURS = {"usable": "\x1b[32m", MISSING: "\x1b[31m", BROKEN: "\x1b[31m", LEFT_OUT: "\x1b[33m", HARMLESS: "\x1b[2m"}
_PLAIN = "\x1b[0m"
_HEADER = ("data set", "state", "images", "opened", "questions", "targets", "published")


@dataclass(slots=True)
class Finding:
    """One kind of trouble: how often, and the first that has it."""

    level: str
    cause: str
    count: int
    first: str


@dataclass(slots=True)
class SetReport:
    """What was found of one split of one data set.

    images: how many its reader has, 0 where none could be made. opened, questions, targets: how many samples were
    looked into, and what they hold. keys: which images it has; contents: path by content hash, of those opened.
    """

    name: str
    split: str
    is_training: bool
    absent: list[MissingPath] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    images: int = 0
    opened: int = 0
    questions: int = 0
    targets: int = 0
    keys: set[str] = field(default_factory=set)
    contents: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"

    def add(self, level: str, cause: str, first: str, count: int = 1) -> None:
        """Count a finding; only the first of a kind keeps its sentence."""
        for finding in self.findings:
            if (finding.level, finding.cause) == (level, cause):
                finding.count += count
                return
        self.findings.append(Finding(level, cause, count, first))

    @property
    def state(self) -> str:
        """missing, broken or usable."""
        levels = {finding.level for finding in self.findings}
        return MISSING if self.absent or MISSING in levels else BROKEN if BROKEN in levels else "usable"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "data_set": self.name,
            "split": self.split,
            "used_for": "training" if self.is_training else "evaluation",
            "state": self.state,
            "images": self.images,
            "published": PUBLISHED.get(self.name),
            "opened": self.opened,
            "questions": self.questions,
            "targets": self.targets,
            "missing": [{"path": one.path, "remedy": one.remedy} for one in self.absent],
            "findings": [
                {"level": one.level, "cause": one.cause, "count": one.count, "first": one.first}
                for one in self.findings
            ],
        }


@dataclass(frozen=True, slots=True)
class Leak:
    """Images that a training set shares with an evaluation split; `by` says how they were recognised."""

    training: str
    evaluation: str
    by: str
    count: int
    first: str


def format_table(reports: Sequence[SetReport], leaks: Sequence[Leak], colour: bool) -> str:
    """A line per data set with what was found below it, then the leaks. `colour`: with ANSI colours."""
    rows = [_HEADER, *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [_line(rows[0], widths)]
    for report, row in zip(reports, rows[1:], strict=True):
        lines.append(_colour(_line(row, widths), report.state, colour))
        for missing in report.absent:
            lines.append(_colour(f"    {MISSING}: {missing.path}: {missing.remedy}", MISSING, colour))
        for one in sorted(report.findings, key=lambda one: LEVELS.index(one.level)):
            lines.append(_colour(f"    {one.level}: {one.count} × {one.cause}; first: {one.first}", one.level, colour))
    if leaks:
        lines.append("images of training that evaluation shows (--exclude_val leaves them out of refer_seg):")
    for leak in leaks:
        told = f"    {leak.training} and {leak.evaluation}: {leak.count} by {leak.by}; first: {leak.first}"
        lines.append(_colour(told, LEFT_OUT, colour))
    return "\n".join(lines)


def _row(report: SetReport) -> tuple[str, ...]:
    counts = (report.images, report.opened, report.questions, report.targets)
    return (str(report), report.state, *map(str, counts), PUBLISHED.get(report.name, "-"))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _colour(text: str, level: str, colour: bool) -> str:
    return f"{_COLOURS[level]}{text}{_PLAIN}" if colour else text

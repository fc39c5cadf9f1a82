"""Going on where an evaluation was ended: what was scored before is read again rather than asked again.

While an evaluation runs, each rank has a file that holds a first line, which says what is evaluated and how, then a
line per scored question: its key, its line of samples.jsonl and its figures.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.evaluation.aggregate import QuestionScores
from utils.evaluation.questions import EvalQuestion

PART = "samples.jsonl.part"
"""Name of the first rank's file; those of the others have their number behind it."""

Key = tuple[str, str, int]
Record = dict[str, Any]


def question_key(question: EvalQuestion) -> Key:
    """What tells a question from all others of a run, and sorts it."""
    return question.dataset, question.sample_id, question.number


def make_entry(question: EvalQuestion, figures: QuestionScores, line: Mapping[str, Any]) -> Record:
    """What is kept of a scored question; plain enough for JSON."""
    return {"key": question_key(question), "figures": dataclasses.asdict(figures), "line": line}


def scores_of_entry(record: Record) -> QuestionScores:
    """The figures in a record."""
    found: QuestionScores = read_dataclass(QuestionScores, record["figures"])
    return found


def list_part_files(folder: Path) -> list[Path]:
    """The files of all ranks."""
    return sorted(path for path in folder.glob(f"{PART}*") if path.name[len(PART) :].isdecimal() or path.name == PART)


def read_records(folder: Path, run: Mapping[str, Any]) -> dict[Key, Record]:
    """What the ranks of an ended run left, if it was the same run: files whose first line says otherwise count for
    nothing. A last line that was cut off is dropped."""
    found: dict[Key, Record] = {}
    for path in list_part_files(folder):
        records = _whole_lines(path)
        if records and records[0] == json.loads(json.dumps(run)):
            for record in records[1:]:
                dataset, sample_id, number = record["key"]
                found[dataset, sample_id, number] = record
    return found


def read_dataclass(kind: Any, value: Any) -> Any:
    """The dataclass `kind` that `dataclasses.asdict` and JSON made `value` of; its fields may be dataclasses, tuples,
    plain values, or None beside one of these."""
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        return None if value is None else read_dataclass(kind, value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: read_dataclass(hints[name], part) for name, part in value.items()})
    return tuple(value) if typing.get_origin(kind) is tuple else value


def _whole_lines(path: Path) -> list[Any]:
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found

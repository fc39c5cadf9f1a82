"""Going on where an evaluation was ended: what was scored before is read again rather than asked again.

While an evaluation runs, a file holds a first line that says what is evaluated and how, then a line per scored
question: its line of samples.jsonl, its figures, and the answer's words.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.evaluation import EvalQuestion, Scored, truths_of
from utils.scores.figures import Figures, drawn

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Remembered:
    """An answer as it was; boxes and all as the predictor gave them."""

    text: str
    marked_text: str
    phrases: list[str]
    masks: np.ndarray
    scores: list[float]
    boxes: list[tuple[int, int, int, int]]
    num_broken: int


def key_of(question: EvalQuestion) -> Key:
    """What tells a question from all others of a run, and sorts it."""
    return question.dataset, question.sample_id, question.number


def record_of(scored: Scored, line: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a scored question so that `Earlier` can restore it; plain enough for JSON."""
    return {
        "key": key_of(scored.question),
        "text": scored.answer.text,
        "figures": dataclasses.asdict(scored.figures),
        "line": line,
    }


class Earlier:
    """The questions that an ended run had scored, if it was the same run; none otherwise.

    path: the file it left. run: what is evaluated and how, which must be that of the file. A last line that was cut
    off is dropped.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self._records: dict[Key, dict[str, Any]] = {}
        records = _whole_lines(path)
        if records and records[0] == json.loads(json.dumps(run)):
            for record in records[1:]:
                dataset, sample_id, number = record["key"]
                self._records[dataset, sample_id, number] = record

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def records(self) -> list[dict[str, Any]]:
        """What `record_of` gave, in the order of scoring."""
        return list(self._records.values())

    def restore(self, question: EvalQuestion) -> Scored | None:
        """The question as it was scored; None where it was not."""
        record = self._records.get(key_of(question))
        if record is None:
            return None
        line = record["line"]
        masks = _decoded(line["masks"], line["size"])
        truths = truths_of(question, masks.shape[1:])
        answer = Remembered(
            record["text"],
            line["answer"],
            line["phrases"],
            masks,
            line["scores"],
            [(box[0], box[1], box[2], box[3]) for box in line["boxes"]],
            line["num_broken"],
        )
        figures: Figures = from_plain(Figures, record["figures"])
        return Scored(question, truths, answer, line["protocol"], drawn(masks, truths), figures)


def from_plain(kind: Any, value: Any) -> Any:
    """The dataclass `kind` that `dataclasses.asdict` and JSON made `value` of; its fields may be dataclasses, tuples,
    plain values, or None beside one of these."""
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        return None if value is None else from_plain(kind, value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_plain(hints[name], part) for name, part in value.items()})
    return tuple(value) if typing.get_origin(kind) is tuple else value


def _whole_lines(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def _decoded(counts: list[str], size: list[int]) -> np.ndarray:
    """`lines.encoded` undone: bool (P, H, W)."""
    from pycocotools import mask as coco_rle

    height, width = size
    masks = [coco_rle.decode({"size": [height, width], "counts": text.encode("ascii")}) for text in counts]
    return np.array(masks, dtype=bool).reshape(len(masks), height, width)

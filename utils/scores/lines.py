"""samples.jsonl: what was asked, answered and scored, a line per question; without times, so that runs can be compared.

Lines are sorted by data set, sample and place of the question in its sample: equal runs write equal bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from utils import metrics
from utils.evaluation import Scored
from utils.scores.protocols import FREE
from utils.scores.resume import Earlier, Key, key_of, record_of
from utils.scripts import UserError

SAMPLES = "samples.jsonl"

MISSED, EXTRA, WRONG_PHRASE, BROKEN, BAD_MASK = "missed", "extra", "wrong phrase", "broken group", "bad mask"
CAUSES = (MISSED, EXTRA, WRONG_PHRASE, BROKEN, BAD_MASK)
"""Why an answer is not right: fewer masks than targets, more; a phrase that names no target; seg tokens that are no
whole group; a mask that fits its matched target badly."""

BAD_MASK_BELOW = 0.5
"""IoU with the matched target."""


def causes(scored: Scored) -> list[str]:
    """Those of CAUSES that hold. With the answer given only a mask can be bad."""
    matched, targets = scored.shown.matched, len(scored.question.turn.targets)
    masks = len(matched.of_predictions)
    # A target without a partner has 0, so the pairs are the largest.
    pairs = sorted(matched.of_targets, reverse=True)[: min(masks, targets)]
    holds = {BAD_MASK: any(iou < BAD_MASK_BELOW for iou in pairs)}
    if scored.protocol == FREE:
        names = [target.name for target in scored.question.turn.targets]
        said = scored.answer.phrases
        holds |= {
            MISSED: masks < targets,
            EXTRA: masks > targets,
            WRONG_PHRASE: metrics.named(said, names) < min(len(said), targets),
            BROKEN: scored.answer.num_broken > 0,
        }
    return [cause for cause in CAUSES if holds.get(cause)]


def encoded(masks: np.ndarray) -> list[str]:
    """bool (P, H, W) -> the `counts` of each mask's compressed COCO run lengths; `size` is [H, W]."""
    from pycocotools import mask as coco_rle

    return [coco_rle.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii") for mask in masks]


def line_of(scored: Scored) -> dict[str, Any]:
    """A scored question, plain enough for JSON.

    `protocol` says how `answer`, `masks` and what is told of them came about; `iou` and its neighbours are free-running
    and null where the model was not let speak. Masks are compressed run lengths of `size`.
    """
    question, answer, figures, shown = scored.question, scored.answer, scored.figures, scored.shown
    turn, free, said = question.turn, figures.free, figures.said
    return {
        "id": f"{question.sample_id}#{question.number}",
        "protocol": scored.protocol,
        "dataset": question.dataset,
        "sample_id": question.sample_id,
        "image_path": question.image_path,
        "kind": turn.kind,
        "question": turn.question,
        "names": [target.name for target in turn.targets],
        "true_answer": turn.answer,
        "answer": answer.marked_text,
        "phrases": list(answer.phrases),
        "scores": list(answer.scores),
        "boxes": [list(box) for box in answer.boxes],
        "size": list(answer.masks.shape[1:]),
        "masks": encoded(answer.masks),
        "num_broken": answer.num_broken,
        "causes": causes(scored),
        "ious_of_masks": list(shown.matched.of_predictions),
        "ious_of_targets": list(shown.matched.of_targets),
        "iou": None if free is None else free.iou,
        "intersection": None if free is None else free.overlap.intersection,
        "union": None if free is None else free.overlap.union,
        "matched_iou": None if free is None else free.matched.iou,
        "count_right": figures.count_right,
        "text_right": None if said is None else said.text_right,
        "iou_teacher_forced": None if figures.forced is None else figures.forced.iou,
        "iou_shuffled": figures.shuffled_iou,
    }


class Lines:
    """Writes scored questions as they come into `samples.jsonl.part`, and once all are there their lines, sorted, into
    `samples.jsonl`.

    run: what is evaluated and how, plain enough for JSON. Where an earlier evaluation of the same was ended, `earlier`
    has what it scored.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._path = folder / SAMPLES
        self._part = folder / f"{SAMPLES}.part"
        self._run = run
        self._sorted: list[tuple[Key, str]] = []
        self.earlier = Earlier(self._part, run)

    def __enter__(self) -> "Lines":
        # The earlier part is replaced in one go: being ended now must not cost it.
        draft = self._part.with_name(f"{SAMPLES}.draft")
        draft.write_text("".join(map(_text, [self._run, *self.earlier.records()])), encoding="utf-8")
        os.replace(draft, self._part)
        self._file = self._part.open("a", encoding="utf-8")
        return self

    def add(self, scored: Scored) -> None:
        """Take in one scored question."""
        key, line = key_of(scored.question), line_of(scored)
        if key not in self.earlier:
            self._file.write(_text(record_of(scored, line)))
        self._sorted.append((key, _text(line)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            draft = self._path.with_name(f"{SAMPLES}.draft")
            draft.write_text("".join(text for _, text in sorted(self._sorted)), encoding="utf-8")
            os.replace(draft, self._path)
            self._part.unlink()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a results folder. UserError when there are none, or one is no JSON object."""
    path = folder / SAMPLES
    try:
        texts = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a folder that evaluate.py wrote") from error
    return list(_parsed(texts, path))


def _parsed(texts: Sequence[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "id" not in line:
            raise UserError(f"line {number} of {path} is not a scored question: score again with this evaluate.py")
        yield line

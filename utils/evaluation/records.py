"""samples.jsonl: what was asked, answered and scored, a line per question; without times, so that runs can be compared.

RecordWriter are sorted by data set, sample and place of the question in its sample: equal runs write equal bytes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli.atomic_files import open_atomic
from utils.cli.errors import UserError
from utils.evaluation import metrics
from utils.evaluation.ask import Pairing, Scored, ScoredText
from utils.evaluation.protocols import FREE, TEACHER
from utils.evaluation.questions import EvalQuestion
from utils.evaluation.ranks import Ranks
from utils.evaluation.resume import PART, Record, list_part_files, make_entry, question_key, read_records
from utils.evaluation.run_lengths import encode_masks

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
            WRONG_PHRASE: metrics.count_named(said, names) < min(len(said), targets),
            BROKEN: scored.answer.num_broken > 0,
        }
    return [cause for cause in CAUSES if holds.get(cause)]


def make_record(scored: Scored) -> dict[str, Any]:
    """A scored question, plain enough for JSON.

    `protocol` says how `answer`, `masks` and what is told of them came about; `iou_shown` is the IoU of these masks.
    `iou` and its neighbours are free-running and null where the model was not let speak. Masks are compressed run
    lengths of `size`. `muse`: what the answer scores by MUSE's matching, and the number of each mask's target.
    """
    question, answer, figures, shown = scored.question, scored.answer, scored.figures, scored.shown
    turn, free, said, pairing = question.turn, figures.free, figures.said, scored.pairing
    return {
        **_asked(question, scored.protocol),
        "names": [target.name for target in turn.targets],
        "true_answer": turn.answer,
        "true_masks": encode_masks(scored.truths == 1),
        "answer": answer.marked_text,
        "phrases": list(answer.phrases),
        "scores": list(answer.scores),
        "boxes": [list(box) for box in answer.boxes],
        "size": list(answer.masks.shape[1:]),
        "masks": encode_masks(answer.masks),
        "num_broken": answer.num_broken,
        "causes": causes(scored),
        "ious_of_masks": list(shown.matched.of_predictions),
        "ious_of_targets": list(shown.matched.of_targets),
        "iou_shown": shown.iou,
        "iou": None if free is None else free.iou,
        "intersection": None if free is None else free.overlap.intersection,
        "union": None if free is None else free.overlap.union,
        "matched_iou": None if free is None else free.matched.iou,
        "count_right": figures.count_right,
        "text_right": None if said is None else said.text_right,
        "iou_teacher_forced": None if figures.forced is None else figures.forced.iou,
        "iou_shuffled": figures.shuffled_iou,
        "muse": None if pairing is None else _muse(pairing),
    }


def shown_iou(line: Mapping[str, Any]) -> float:
    """IoU of the masks that a line holds."""
    return float(line["iou_shown"])


def make_text_record(spoken: ScoredText) -> dict[str, Any]:
    """A question answered in words alone, plain enough for JSON. earlier: the turns before it, question and answer."""
    question, words = spoken.question, spoken.figures.words
    return {
        **_asked(question, TEACHER if spoken.text is None else FREE),
        "earlier": [[turn.question, turn.answer] for turn in question.earlier],
        "true_answer": question.turn.answer,
        "references": list(question.references),
        "answer": spoken.text,
        "exact_match": words and words.exact,
        "vqa_accuracy": words and words.vqa,
        "nll": words and words.nll,
        "num_tokens": words and words.num_tokens,
    }


def _asked(question: EvalQuestion, protocol: str) -> dict[str, Any]:
    return {
        "id": f"{question.sample_id}#{question.number}",
        "protocol": protocol,
        "dataset": question.dataset,
        "sample_id": question.sample_id,
        "image_path": question.image_path,
        "kind": question.turn.kind,
        "question": question.turn.question,
    }


def _muse(pairing: Pairing) -> dict[str, Any]:
    overlap = pairing.matched.overlap
    return {
        "iou": pairing.matched.iou,
        "intersection": overlap.intersection,
        "union": overlap.union,
        "partners": list(pairing.partners),
    }


class RecordWriter:
    """Writes scored questions as they come, each rank into a file of its own, and at the end their lines, sorted, into
    `samples.jsonl`.

    run: what is evaluated and how, plain enough for JSON. Where an earlier evaluation of the same was ended, on however
    many ranks, `earlier` holds the keys of what it scored. All ranks share `folder`, make and enter this together, and
    leave it by `finish` or by an exception.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], ranks: Ranks | None = None) -> None:
        self._folder, self._run, self._ranks = folder, run, ranks or Ranks()
        self._part = folder / (PART if self._ranks.rank == 0 else f"{PART}{self._ranks.rank}")
        self._earlier = read_records(folder, run)
        self.earlier = frozenset(self._earlier)

    def __enter__(self) -> "RecordWriter":
        self._ranks.wait()  # all have read what is there
        if self._ranks.rank == 0:
            # The earlier part is replaced in one go: being ended now must not cost it.
            with open_atomic(self._part) as file:
                file.writelines(map(_text, [self._run, *self._earlier.values()]))
            for path in list_part_files(self._folder):
                if path != self._part:
                    path.unlink()
        self._ranks.wait()
        if self._ranks.rank != 0:
            self._part.write_text(_text(self._run), encoding="utf-8")
        self._file = self._part.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, scored: Scored | ScoredText) -> None:
        """Take in one scored question. It is in the file when this returns."""
        line = make_text_record(scored) if isinstance(scored, ScoredText) else make_record(scored)
        self._file.write(_text(make_entry(scored.question, scored.figures, line)))
        self._file.flush()

    def finish(self, order: Sequence[EvalQuestion]) -> list[Record]:
        """What all ranks scored, in the given order, with `samples.jsonl` written; nothing on ranks but the first."""
        self._file.close()
        self._ranks.wait()
        if self._ranks.rank != 0:
            return []
        records = read_records(self._folder, self._run)
        lines = [_text(record["line"]) for _, record in sorted(records.items())]
        with open_atomic(self._folder / SAMPLES) as file:
            file.writelines(lines)
        for path in list_part_files(self._folder):
            path.unlink()
        return [records[question_key(question)] for question in order]


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
        if "surprise" in line:  # as results were written until December 2026
            line["nll"] = line.pop("surprise")
        yield line

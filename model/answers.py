"""What comes of a question: an answer in words with a mask for every thing named, and the events of its making.

Axes: Q targets of one answer, H W pixels of the image itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .answer_text import DecodedAnswer
from .structures import Box

_EPSILON = 1e-6


@dataclass(frozen=True)
class Answer:
    """What the model answered about an image, and a mask for every seg group in it.

    text: without groups; marked_text: with "{seg}" where each group stood; phrases: the words each group belongs to.
    masks: bool (Q, H, W) in the image's own pixels. scores: mean probability inside each mask, 0 for an empty one.
    boxes: (x0, y0, x1, y1) pixels, x1 and y1 exclusive, so that x1 - x0 is a width; all 0 for an empty mask.
    areas: pixels of each mask. num_broken: runs of seg tokens that were no whole groups and gave no mask.
    """

    text: str
    marked_text: str
    phrases: list[str]
    masks: np.ndarray
    scores: list[float]
    boxes: list[Box]
    areas: list[int]
    num_broken: int

    def to_dict(self) -> dict[str, Any]:
        """The answer in plain numbers and words; every mask as COCO's run lengths, boxes as in `boxes`."""
        parts = zip(self.phrases, self.scores, self.boxes, self.areas, self.masks, strict=True)
        return {
            "text": self.text,
            "marked_text": self.marked_text,
            "num_broken": self.num_broken,
            "targets": [
                {"phrase": phrase, "score": score, "box": list(box), "area": area, "segmentation": encode_rle(mask)}
                for phrase, score, box, area, mask in parts
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


@dataclass(frozen=True)
class TextPiece:
    """The next piece of an answer's text; all pieces together are the text."""

    text: str


@dataclass(frozen=True)
class TargetStarted:
    """A seg group has begun: its mask is to come, unless the model breaks the group off. number: counted from 0."""

    number: int


@dataclass(frozen=True)
class MaskReady:
    """The mask of a target, while the text goes on; fields as in `Answer`, logits: float32 (H, W)."""

    number: int
    phrase: str
    mask: np.ndarray
    score: float
    box: Box
    logits: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """The whole answer, equal to what `ask` gives."""

    answer: Answer


Event = TextPiece | TargetStarted | MaskReady | Finished


def compose_answer(turns: Sequence[DecodedAnswer], mask_logits: torch.Tensor, *, release_groups: bool) -> Answer:
    """An answer from its words and masks.

    Args:
        turns: one, or the answers of several turns, whose masks follow each other.
        mask_logits: (Q, H, W) float32 in the image's own pixels.
        release_groups: the config's `group_rule` is "release": groups of the question come first and have no words in
            the answer, and a broken group costs all masks.

    Raises:
        RuntimeError: words and masks differ in their number of groups.
    """
    masks = (mask_logits > 0).cpu().numpy()
    groups = sum(turn.num_groups for turn in turns)
    phrases = [phrase for turn in turns for phrase in turn.phrases]
    if release_groups:
        phrases = align_phrases(phrases, len(masks))
    elif groups != len(masks):
        raise RuntimeError(
            f"the model decoded {len(masks)} masks where the processor reads {groups} seg groups; "
            "the processor's seg tokens are not those of the model's config"
        )
    return Answer(
        text=" ".join(turn.text for turn in turns),
        marked_text=" ".join(turn.marked_text for turn in turns),
        phrases=phrases,
        masks=masks,
        scores=mask_scores(mask_logits),
        boxes=[mask_box(mask) for mask in masks],
        areas=[int(np.count_nonzero(mask)) for mask in masks],
        num_broken=sum(turn.num_broken for turn in turns),
    )


def align_phrases(phrases: list[str], count: int) -> list[str]:
    """The last `count` of phrases, with "" before them for groups that have no words in the answer."""
    return ([""] * count + phrases)[len(phrases) :]


def mask_scores(mask_logits: torch.Tensor) -> list[float]:
    """(Q, H, W) logits -> mean probability over each mask's pixels, those with logit > 0 (docs/facts.md, M12)."""
    inside = mask_logits > 0
    summed = (mask_logits.sigmoid() * inside).sum((1, 2))
    return (summed / (inside.sum((1, 2)) + _EPSILON)).tolist()


def mask_box(mask: np.ndarray) -> Box:
    """The smallest box around a bool mask (H, W) as (x0, y0, x1, y1), end exclusive; all 0 when nothing is set."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A bool mask (H, W) as COCO's compressed run lengths, {"size": [H, W], "counts": text}."""
    from pycocotools import mask as coco  # here, because only what is written down needs it

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}

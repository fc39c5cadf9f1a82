"""What a judge reads, and how its verdict is read: pure functions and one file of words."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from model.structures import SEG_MARKER
from utils.cli.errors import UserError
from utils.evaluation.metrics import mask_box
from utils.evaluation.run_lengths import decode_masks

PROMPT_FILE = Path(__file__).with_name("prompt.txt")

LOWEST, HIGHEST = 0, 10
"""The scale of a verdict."""

NOTHING = "(none)"
"""Stands for a group whose mask belongs to no target."""

_PLACES = ("question", "answer", "reference")
_NEEDED = frozenset({"question", "answer"})
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_VERDICT = re.compile(r"^\W*score\W*[:=][\s*_`\"'<(\[]*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class JudgePrompt:
    """The words a judge is asked with; in them $question, $answer and, if it is wanted, $reference are filled in."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        """Of the words as they are written."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def filled(self, question: str, answer: str, reference: str) -> str:
        """The prompt about one answer."""
        return Template(self.text).substitute(question=question, answer=answer, reference=reference)


def read_prompt(path: str | Path = PROMPT_FILE) -> JudgePrompt:
    """The prompt in a file. UserError where it cannot be read, or its places to fill in are not those there are."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read --judge_prompt {path}: {getattr(error, 'strerror', None) or error}; give a text file"
        ) from None
    found = set()
    for match in Template.pattern.finditer(text):
        name = match["named"] or match["braced"]
        if match["escaped"] is None and name not in _PLACES:
            raise UserError(
                f"--judge_prompt {path} holds {match[0]!r}; expected {', '.join('$' + place for place in _PLACES)}, "
                "and $$ where a dollar is meant"
            )
        found.add(name)
    if missing := _NEEDED - found:
        raise UserError(f"--judge_prompt {path} lacks {' and '.join('$' + name for name in sorted(missing))}: add it")
    return JudgePrompt(text, str(path))


def read_verdict(reply: str) -> float | None:
    """The score in a judge's reply, in [LOWEST, HIGHEST]; None unless its lines of the form "SCORE: number" agree."""
    lines = _THOUGHT.sub("", reply).splitlines()
    found = {float(match[1]) for line in lines if (match := _VERDICT.match(line))}
    if len(found) != 1:
        return None
    (value,) = found
    return value if LOWEST <= value <= HIGHEST else None


def texts_for_judge(line: Mapping[str, Any]) -> tuple[str, str]:
    """(answer, true answer) of a scored question, as a line of samples.jsonl has it, with every group replaced.

    A group becomes what its mask was matched with, "(a red cup [10, 12, 40, 50])": the target's name and the box
    around its true mask, x0, y0, x1, y1 in pixels, end exclusive; NOTHING where it was matched with no target.
    Where the words themselves hold the marker, so that no one can tell the groups' places, they are put at the end.
    """
    shown = [
        f"({name} {list(mask_box(mask) or ())})"
        for name, mask in zip(line["names"], decode_masks(line["true_masks"], line["size"]), strict=True)
    ]
    found = [NOTHING if partner is None else shown[partner] for partner in line["muse"]["partners"]]
    return _replaced(line["answer"], found), _replaced(line["true_answer"], shown)


def _replaced(text: str, groups: list[str]) -> str:
    parts = text.split(SEG_MARKER)
    if len(parts) != len(groups) + 1:
        return " ".join([text, *groups])
    return parts[0] + "".join(group + part for group, part in zip(groups, parts[1:], strict=True))

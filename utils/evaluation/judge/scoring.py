"""MUSE's scores from lines of samples.jsonl: before a judge, after one, and at every threshold a judge's verdict may
have to reach.

A question's IoU is the sum over matched pairs over max(#predicted, #true); a verdict below the threshold makes it 0,
and its intersection too.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli.atomic_files import open_atomic
from utils.cli.errors import UserError
from utils.evaluation import bootstrap
from utils.evaluation.judge.asking import Judge, Replies, ReplyCache, ask_all
from utils.evaluation.judge.prompts import HIGHEST, LOWEST, JudgePrompt, read_verdict, texts_for_judge

VERDICTS, CACHE = "verdicts.jsonl", "judge_cache.jsonl"

NO_JUDGE: Mapping[str, Any] = {"kind": "none"}

Line = Mapping[str, Any]


def muse_lines(lines: Sequence[Line]) -> list[Line]:
    """The lines that MUSE's matching scored, in order."""
    return [line for line in lines if line.get("muse") is not None]


def nothing_to_judge(folder: Path) -> UserError:
    """The sentence where `muse_lines` finds none."""
    return UserError(
        f"{folder} holds no free-running answers to MUSE's questions: score MultiReasonSeg|SPLIT with --protocol free "
        "first"
    )


def pre_judge(lines: Sequence[Line]) -> dict[str, Any]:
    """{data set: gIoU and cIoU of its lines with their 95% intervals}, no answer having been judged."""
    return {name: {"n": len(group)} | _scores(group, [True] * len(group)) for name, group in _by_set(lines).items()}


def judge_answers(
    lines: Sequence[Line], judge: Judge, prompt: JudgePrompt, cache: Path, folder: Path, threshold: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """({data set: judged scores}, facts about the judging); `verdicts.jsonl` in `folder` tells of every answer."""
    texts = [texts_for_judge(line) for line in lines]
    prompts = [
        prompt.filled(line["question"], answer, truth) for line, (answer, truth) in zip(lines, texts, strict=True)
    ]
    replies = ask_all(judge, prompts, ReplyCache(cache))
    verdicts = [None if reply is None else read_verdict(reply) for reply in replies.replies]
    _write_verdicts(folder / VERDICTS, lines, texts, replies, verdicts)
    facts = {
        **judge.facts,
        "prompt": prompt.source,
        "prompt_sha256": prompt.sha256,
        "scale": [LOWEST, HIGHEST],
        "threshold": threshold,
        "asked": replies.asked,
    }
    told = list(zip(lines, replies.replies, verdicts, strict=True))
    scores = {name: _judged([one for one in told if one[0]["dataset"] == name], threshold) for name in _by_set(lines)}
    return scores, facts


def _judged(told: Sequence[tuple[Line, str | None, float | None]], threshold: float) -> dict[str, Any]:
    """Scores over the lines that have a verdict. `giou_range`: over all, had the others all failed or all passed."""
    known = [(line, verdict) for line, _, verdict in told if verdict is not None]
    lines = [line for line, _ in known]
    rest = sum(line["muse"]["iou"] for line, _, verdict in told if verdict is None)
    scores = _scores(lines, [verdict >= threshold for _, verdict in known])
    passed = (scores["giou"] or 0.0) * len(known)
    return {
        "n": len(known),
        "unparsable": sum(reply is not None and verdict is None for _, reply, verdict in told),
        "unanswered": sum(reply is None for _, reply, _ in told),
        **scores,
        "giou_range": [passed / len(told), (passed + rest) / len(told)],
        "by_threshold": {
            str(at): {"passed": sum(verdict >= at for _, verdict in known)}
            | _scores(lines, [verdict >= at for _, verdict in known], add_intervals=False)
            for at in range(LOWEST, HIGHEST + 1)
        },
    }


def _scores(lines: Sequence[Line], passed: Sequence[bool], add_intervals: bool = True) -> dict[str, Any]:
    """gIoU and cIoU where answers that did not pass score 0; None without lines."""
    if not lines:
        return {"giou": None, "ciou": None}
    values = np.array(
        [
            (one["muse"]["iou"] * ok, one["muse"]["intersection"] * ok, 1.0, one["muse"]["union"])
            for one, ok in zip(lines, passed, strict=True)
        ]
    )
    iou, intersection, n, union = values.sum(axis=0)
    # Nothing asked for and nothing drawn is right, as far as the judge lets it be.
    found: dict[str, Any] = {"giou": iou / n, "ciou": intersection / union if union else iou / n}
    if add_intervals:
        sums = bootstrap.by_unit([line["image_path"] for line in lines], values)
        bounds = bootstrap.ratio_intervals(sums[:, :2], sums[:, 2:])
        found |= {f"{name}_interval": list(bound) for name, bound in zip(("giou", "ciou"), bounds, strict=True)}
    return found


def _by_set(lines: Sequence[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["dataset"], []).append(line)
    return groups


def _write_verdicts(
    path: Path,
    lines: Sequence[Line],
    texts: Sequence[tuple[str, str]],
    replies: Replies,
    verdicts: Sequence[float | None],
) -> None:
    told = []
    for line, (answer, truth), reply, verdict in zip(lines, texts, replies.replies, verdicts, strict=True):
        one = {"id": line["id"], "dataset": line["dataset"], "question": line["question"], "answer": answer}
        one |= {"true_answer": truth, "iou": line["muse"]["iou"], "verdict": verdict, "reply": reply}
        told.append(json.dumps(one, ensure_ascii=False) + "\n")
    with open_atomic(path) as file:
        file.writelines(told)

"""Questions from a file: answers as JSON lines with run-length masks, and an overlay each; goes on where it stopped."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from model.answers import Answer
from model.image_processing_pixellm import open_image
from model.predictor import Predictor
from model.session import AnswerOptions
from utils.cli.atomic_files import open_atomic
from utils.cli.errors import UserError, explain
from utils.serving.files import write_answer
from utils.serving.terminal import one_line

logger = logging.getLogger(__name__)

RESULTS, OVERLAYS = "results.jsonl", "overlays"
QUESTIONS_AT_ONCE = 8


@dataclass(frozen=True)
class FileQuestion:
    """One line of the file: its number from 1, the image's path and the question."""

    line: int
    image: str
    question: str


def answer_file(
    questions: Path,
    out: Path,
    predictor: Predictor,
    max_new_tokens: int,
    options: AnswerOptions,
    settings: dict[str, Any],
) -> int:
    """Answer every line {"image": path, "question": text} of `questions`; a relative path begins at the file's folder.

    Into `out`/results.jsonl comes a line for each that could be answered, in the order of the file, and into
    `out`/overlays its overlay and masks. What an earlier run with equal settings has answered is kept. A bad line is
    reported on stderr and skipped; returns how many were. UserError when the file cannot be read or `out` written.

    settings: what answers depend on, plain enough for JSON.
    """
    asked, bad = read_questions(questions)
    path = out / RESULTS
    try:
        (out / OVERLAYS).mkdir(parents=True, exist_ok=True)
        done = _earlier(path, settings)
        kept = [done[one] for one in asked if one in done]
        with open_atomic(path) as file:
            file.writelines(map(_text, kept))
        if kept:
            logger.info(f"{len(kept)} of {len(asked)} questions were answered before: going on behind them")
        waiting = [one for one in asked if one not in done]
        with path.open("a", encoding="utf-8") as file, tqdm(total=len(waiting), unit="question") as bar:
            for some in _chunks(waiting):
                images, good = _open_images(some, questions.parent, predictor, bad)
                answers = _answer(good, images, predictor, max_new_tokens, options)
                for one, answer in zip(good, answers, strict=True):
                    write_answer(out / _overlay_name(one), images[one.image], answer)
                    file.write(_text(_record(one, answer, settings)))
                    file.flush()
                bar.update(len(some))
        done = _earlier(path, settings)
        with open_atomic(path) as file:
            file.writelines(_text(done[one]) for one in asked if one in done)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; choose another folder") from error
    for line in sorted(bad):
        logger.warning(f"{questions} line {line}: {one_line(bad[line])}")
    return len(bad)


def read_questions(path: Path) -> tuple[list[FileQuestion], dict[int, str]]:
    """The questions of a file, and by line number what is wrong with its other lines; empty lines are neither."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the questions {path}: {error.strerror or error}") from error
    asked: list[FileQuestion] = []
    bad: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line.decode("utf-8"))
        except ValueError as error:
            bad[number] = f"is no JSON in UTF-8 ({error}); skipped"
            continue
        fields = [content.get(name) if isinstance(content, dict) else None for name in ("image", "question")]
        if all(isinstance(field, str) and field.strip() for field in fields):
            asked.append(FileQuestion(number, str(fields[0]), str(fields[1])))
        else:
            bad[number] = 'needs a text "image" and a text "question"; skipped'
    if not asked and not bad:
        raise UserError(f'{path} holds no question: write lines such as {{"image": "a.jpg", "question": "the cup"}}')
    return asked, bad


def _chunks(waiting: Sequence[FileQuestion]) -> Iterator[list[FileQuestion]]:
    for start in range(0, len(waiting), QUESTIONS_AT_ONCE):
        yield list(waiting[start : start + QUESTIONS_AT_ONCE])


def _open_images(
    some: Sequence[FileQuestion], folder: Path, predictor: Predictor, bad: dict[int, str]
) -> tuple[dict[str, np.ndarray], list[FileQuestion]]:
    """The images by their names and the questions that can be asked about them; the rest goes into `bad`."""
    images: dict[str, np.ndarray] = {}
    good = []
    for one in some:
        try:
            if one.image not in images:
                images[one.image] = open_image(str(folder / one.image))
            predictor.processor.encode_question(one.question)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            bad[one.line] = f"{sentence}; skipped"
        else:
            good.append(one)
    return images, good


def _answer(
    good: Sequence[FileQuestion],
    images: dict[str, np.ndarray],
    predictor: Predictor,
    max_new_tokens: int,
    options: AnswerOptions,
) -> list[Answer]:
    names = list(images)
    questions, index = [one.question for one in good], [names.index(one.image) for one in good]
    return predictor.answer(list(images.values()), questions, index, max_new_tokens, options) if good else []


def _overlay_name(one: FileQuestion) -> str:
    return f"{OVERLAYS}/{one.line:06d}.png"


def _record(one: FileQuestion, answer: Answer, settings: dict[str, Any]) -> dict[str, Any]:
    told = {"line": one.line, "image": one.image, "question": one.question}
    return told | answer.to_dict() | {"overlay": _overlay_name(one), "settings": settings}


def _earlier(path: Path, settings: dict[str, Any]) -> dict[FileQuestion, dict[str, Any]]:
    """Records of an earlier run by what was asked; a line cut off when it was killed does not count."""
    found = {}
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line.decode("utf-8"))
                if record["settings"] == settings:
                    found[FileQuestion(record["line"], record["image"], record["question"])] = record
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"

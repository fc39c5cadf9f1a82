"""Asking a judge many questions, each once: replies are kept in a file by what was asked, and read from there."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.cli.errors import UserError

IN_A_ROW = 3
"""After so many questions without a reply, one after the other, asking ends."""


class Unanswered(Exception):
    """This question got no reply; others may."""


class Judge(ABC):
    """Who reads an answer.

    facts: who it is, plain enough for JSON and without secrets; replies are kept by it. parallel: how many may ask at
    once.
    """

    facts: Mapping[str, Any]
    parallel: int = 1

    @abstractmethod
    def ask(self, prompt: str) -> str:
        """The reply. Unanswered, or UserError where asking others is of no use either."""

    def close(self) -> None:  # noqa: B027 (not every judge has something that waits)
        """Ends what still waits."""


@dataclass(frozen=True)
class Replies:
    """replies: one per prompt, None where there was none. asked: how many prompts the judge was given this time."""

    replies: list[str | None]
    asked: int


class ReplyCache:
    """Replies by what was asked of whom, a line each in a file that only grows. A last line that was cut off is
    dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        content = path.read_bytes() if path.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):
                self._take_in(line, number)
        self._cut_off = not content.endswith(b"\n") and bool(content)

    def _take_in(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            self._known[entry["key"]] = entry["reply"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"line {number} of {self._path} is no judge's reply: name another file with --judge_cache, or remove it"
            ) from None

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> str | None:
        """The reply kept under `key`; None where there is none."""
        return self._known.get(key)

    def keep(self, key: str, reply: str) -> None:
        """Add a reply; it is in the file when this returns."""
        text = json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._cut_off:
            self._drop_the_cut_line()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)
        self._known[key] = reply

    def _drop_the_cut_line(self) -> None:
        content = self._path.read_bytes()
        os.truncate(self._path, content.rfind(b"\n") + 1)
        self._cut_off = False


def key_of(judge: Judge, prompt: str) -> str:
    """Changes with the judge and with every letter of what it is asked."""
    content = json.dumps({"judge": dict(judge.facts), "prompt": prompt}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def ask_all(judge: Judge, prompts: Sequence[str], cache: ReplyCache, progress: bool = True) -> Replies:
    """A reply to every prompt: kept ones first, the judge is asked for the others, equal prompts once.

    UserError where the judge cannot be had: what was replied so far is kept.
    """
    keys = [key_of(judge, prompt) for prompt in prompts]
    open_questions = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in cache}
    if open_questions:
        _ask(judge, open_questions, cache, progress)
    return Replies([cache.get(key) for key in keys], len(open_questions))


def _ask(judge: Judge, prompts: Mapping[str, str], cache: ReplyCache, progress: bool) -> None:
    pool = ThreadPoolExecutor(max_workers=judge.parallel, thread_name_prefix="judge")
    try:
        waiting = {pool.submit(judge.ask, prompt): key for key, prompt in prompts.items()}
        failed = 0
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="judge", unit="answer", disable=not progress):
            try:
                cache.keep(waiting[done], done.result())
                failed = 0
            except Unanswered as error:
                failed += 1
                if failed == IN_A_ROW:
                    raise UserError(
                        f"the judge did not reply to {IN_A_ROW} questions in a row (the last: {error}); replies so far "
                        "are kept: put it right and run the same command again"
                    ) from None
    finally:
        judge.close()
        pool.shutdown(wait=True, cancel_futures=True)

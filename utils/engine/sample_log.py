"""What each optimizer step was made of: the numbers of its samples and its loss, a line per step in a file per rank.

After a resume the lines of steps that are done again are taken out, so that the files tell what the weights have seen.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from utils.cli.atomic_files import open_atomic
from utils.engine.base import StepReport

FOLDER = "samples"


class SampleLog:
    """The file of one rank, <folder>/samples/rank0.jsonl; opened at the first line."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / FOLDER / f"rank{rank}.jsonl"
        self._file: IO[str] | None = None

    def write(self, step: int, numbers: list[int], report: StepReport) -> None:
        """Optimizer step `step` (from 1) was made of the samples with these numbers."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        line = {"step": step, "samples": numbers, "loss": report.total}
        line |= {} if report.applied else {"applied": False}
        self._file.write(json.dumps(line) + "\n")
        # Lines of steps that no checkpoint holds may be lost, others never: a checkpoint comes after its lines.
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def sample_numbers(micro_batches: Iterable[Any]) -> list[int]:
    """The numbers of the samples in one rank's micro-batches; what does not say its number is left out."""
    infos = (info for batch in micro_batches for info in getattr(batch, "info", ()))
    return [info["number"] for info in infos if "number" in info]


def drop_later_steps(folder: Path, step: int) -> None:
    """Take the lines of later steps, and half a line at the end, out of every rank's file."""
    for path in sorted((folder / FOLDER).glob("rank*.jsonl")):
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) in range(1, step + 1)]
        with open_atomic(path) as file:
            file.writelines(f"{line}\n" for line in kept)


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def read_losses(folder: Path) -> dict[int, float]:
    """The loss of every step, by its number."""
    lines = (folder / FOLDER / "rank0.jsonl").read_text(encoding="utf-8").splitlines()
    return {read["step"]: read["loss"] for read in map(json.loads, lines)}


def read_consumed(folder: Path) -> list[int]:
    """Every sample that applied steps were made of, in order of steps and, within one, of numbers."""
    by_step: dict[int, list[int]] = {}
    for path in sorted((folder / FOLDER).glob("rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            read = json.loads(line)
            if read.get("applied", True):
                by_step.setdefault(read["step"], []).extend(read["samples"])
    return [number for step in sorted(by_step) for number in sorted(by_step[step])]

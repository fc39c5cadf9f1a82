"""Steps that went wrong: gradients that are not finite, losses far above what they were; who was in them."""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.cli.errors import UserError
from utils.engine.base import Engine, StepReport

DUMPS, SPIKES = "bad_batches", "spikes.jsonl"
# A spike stands this many times the usual scatter above the median of the last steps.
WINDOW, FEWEST, SCATTERS = 100, 20, 8.0


class NotFinite(UserError):
    """Step after step gave gradients that are not finite."""


class NanGuard:
    """Looks at every step's report. All ranks see the same reports, so they decide the same.

    max_in_a_row: steps in a row that may be skipped; the run stops after them. max_dumps: batches kept per rank.
    """

    def __init__(self, folder: Path, engine: Engine, max_in_a_row: int, max_dumps: int = 5) -> None:
        self.folder, self.engine, self.max_in_a_row, self.max_dumps = folder, engine, max_in_a_row, max_dumps
        self.left_out, self.in_a_row = 0, 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def check(self, step: int, report: StepReport, micro_batches: Sequence[Any]) -> list[str]:
        """Sentences about optimizer step `step` (from 1), none where it was as usual.

        Raises NotFinite after `max_in_a_row` steps in a row that were left out.
        """
        if not report.applied or not math.isfinite(report.total):
            return self._bad(step, report, micro_batches)
        self.in_a_row = 0
        said = self._spike(step, report, micro_batches) if self._is_spike(report.total) else []
        self._recent.append(report.total)
        return said

    def _bad(self, step: int, report: StepReport, micro_batches: Sequence[Any]) -> list[str]:
        self.left_out += 1
        self.in_a_row += 1
        ids = self._gather_ids(micro_batches)
        kept = self._dump(step, report, micro_batches) if self.left_out <= self.max_dumps else "not kept, enough are"
        what = f"loss {report.total:.4g}, gradient norm {report.gradient_norm:.4g}"
        if self.max_in_a_row and self.in_a_row >= self.max_in_a_row:
            raise NotFinite(
                f"{self.in_a_row} steps in a row up to step {step} were not finite ({what}) and the run stops; the "
                f"batches are in {self.folder / DUMPS}: look at them, and at the weights of the last checkpoint, which "
                "is from before; a lower --lr, more --warmup_steps or --precision fp32 may help"
            )
        return [
            f"step {step} is left out, it is not finite ({what}), number {self.left_out} of this start; samples "
            f"{', '.join(ids) or 'unknown'}; batch: {kept}"
        ]

    def _dump(self, step: int, report: StepReport, micro_batches: Sequence[Any]) -> str:
        """Keep what this rank's step was made of; says where."""
        path = self.folder / DUMPS / f"step{step}_rank{self.engine.rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "step": step,
            "losses": dict(report.losses),
            "gradient_norm": report.gradient_norm,
            "samples": sample_ids(micro_batches),
            "micro_batches": [batch.as_kwargs() for batch in micro_batches],
        }
        torch.save(content, path)
        return str(path)

    def _gather_ids(self, micro_batches: Sequence[Any]) -> list[str]:
        """What the step's samples are called, on all ranks."""
        return [name for part in self.engine.gather(sample_ids(micro_batches)) for name in part]

    def _is_spike(self, total: float) -> bool:
        if len(self._recent) < FEWEST:
            return False
        middle = statistics.median(self._recent)
        scatter = statistics.median(abs(value - middle) for value in self._recent)
        return total > middle + SCATTERS * max(scatter, 0.02 * abs(middle))

    def _spike(self, step: int, report: StepReport, micro_batches: Sequence[Any]) -> list[str]:
        ids, usual = self._gather_ids(micro_batches), statistics.median(self._recent)
        if self.engine.rank == 0:
            line = {"step": step, "loss": report.total, "usual": usual, "samples": ids, "losses": dict(report.losses)}
            with (self.folder / SPIKES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        return [f"step {step}: loss {report.total:.3f}, usually {usual:.3f}; samples {shown} ({self.folder / SPIKES})"]


def sample_ids(micro_batches: Sequence[Any]) -> list[str]:
    """What the samples of one rank's micro-batches are called."""
    infos = (info for batch in micro_batches for info in getattr(batch, "info", ()))
    return [str(info.get("sample_id", info.get("number"))) for info in infos]

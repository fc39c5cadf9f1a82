"""The training loop: steps, curves, validation, checkpoints. It knows an engine and batches, nothing of the model."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.engine.checkpoints import keep_as, latest_tag, remove_others, tag_of
from utils.engine.protocol import Engine, StepReport
from utils.engine.stepping import Schedule
from utils.scripts import note

CHECKPOINT, BEST = "ckpt_model", "ckpt_model_best"
Scores = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps; 0 is never, but for a checkpoint and a validation at the end."""

    schedule: Schedule
    total_steps: int
    save_every: int
    validate_every: int
    print_every: int = 1
    best_by: str = "giou"


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    scores: Scores = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"step": self.step, "best": self.best, "best_step": self.best_step, "scores": self.scores}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Progress":
        return cls(**{name: saved[name] for name in ("step", "best", "best_step", "scores")})


class Curves:
    """TensorBoard events of a run, on rank 0 only; a resumed run hides what it does again."""

    def __init__(self, folder: Path, first_step: int, active: bool) -> None:
        self.writer: Any = None
        if active:
            from torch.utils.tensorboard import SummaryWriter  # takes a second: not for the other ranks

            self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def step(self, number: int, report: StepReport) -> None:
        """Losses, learning rate and gradient norm after optimizer step `number`."""
        if self.writer is None:
            return
        for name, value in report.losses.items():
            self.writer.add_scalar(f"loss/{name}", value, number)
        self.writer.add_scalar("loss/total", report.total, number)
        self.writer.add_scalar("train/learning_rate", report.learning_rate, number)
        self.writer.add_scalar("train/gradient_norm", report.gradient_norm, number)

    def scores(self, number: int, scores: Scores) -> None:
        """Validation scores."""
        if self.writer is not None:
            for name, value in scores.items():
                self.writer.add_scalar(f"validation/{name}", value, number)

    def pictures(self, number: int, pictures: dict[str, np.ndarray]) -> None:
        """Pictures by name, (H, W, 3) uint8."""
        if self.writer is not None:
            for name, picture in pictures.items():
                self.writer.add_image(name, picture, number, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Run:
    """One run in its folder: ckpt_model is the latest checkpoint, ckpt_model_best the one with the best score."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        folder: Path,
        validate: Callable[[], Scores] | None = None,
        draw: Callable[[], dict[str, np.ndarray]] | None = None,
    ) -> None:
        """
        Args:
            validate: scores by name, the same on every rank; called in inference mode on all ranks together.
            draw: pictures by name, (H, W, 3) uint8; called on rank 0 after each validation, in inference mode.
        """
        self.engine, self.plan, self.folder = engine, plan, folder
        self.validate, self.draw = validate, draw
        self.progress = Progress()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint folder."""
        self.progress = Progress.from_dict(self.engine.load(checkpoint))
        note(f"going on from step {self.progress.step} of {checkpoint}")

    def fit(self, batches: Callable[[int], Iterator[list[Any]]]) -> Progress:
        """Train to the plan's end. `batches(step)` yields each step's micro-batches from optimizer step `step` on."""
        if self.progress.step >= self.plan.total_steps:
            note(f"this run of {self.plan.total_steps} steps is complete: raise --max_steps or --epochs to go on")
            return self.progress
        curves = Curves(self.folder, self.progress.step, self.engine.rank == 0)
        try:
            with self._explain_interrupt():
                self._steps(batches(self.progress.step), curves)
        finally:
            curves.close()
        return self.progress

    def evaluate(self) -> Scores:
        """Validate once, without training."""
        curves = Curves(self.folder, 0, self.engine.rank == 0)
        try:
            self._validate(curves)
        finally:
            curves.close()
        return self.progress.scores

    def _steps(self, batches: Iterator[list[Any]], curves: Curves) -> None:
        plan, progress = self.plan, self.progress
        self.engine.model.train()
        hidden = self.engine.rank != 0
        with tqdm(
            total=plan.total_steps, initial=progress.step, disable=hidden, unit="step", dynamic_ncols=True
        ) as bar:
            while progress.step < plan.total_steps:
                report = self.engine.train_step(next(batches), plan.schedule.rate(progress.step))
                progress.step += 1
                curves.step(progress.step, report)
                if progress.step % plan.print_every == 0:
                    bar.set_postfix_str(describe(report), refresh=False)
                bar.update()
                self._after_step(curves)

    def _after_step(self, curves: Curves) -> None:
        last = self.progress.step == self.plan.total_steps
        improved = False
        if self.validate is not None and (last or _due(self.progress.step, self.plan.validate_every)):
            improved = self._validate(curves)
        if last or improved or _due(self.progress.step, self.plan.save_every):
            self._save(improved)

    def _validate(self, curves: Curves) -> bool:
        """Score, write down, and say whether this is the best so far."""
        if self.validate is None:
            return False
        progress = self.progress
        with self.engine.inference():
            progress.scores = self.validate()
            pictures = self.draw() if self.draw is not None and self.engine.rank == 0 else {}
        curves.scores(progress.step, progress.scores)
        curves.pictures(progress.step, pictures)
        if self.engine.rank == 0:
            tqdm.write(f"step {progress.step}: " + ", ".join(f"{n} {v:.4f}" for n, v in progress.scores.items()))
        score = progress.scores.get(self.plan.best_by)
        if score is None or (progress.best is not None and score <= progress.best):
            return False
        progress.best, progress.best_step = score, progress.step
        return True

    def _save(self, best: bool) -> None:
        folder = self.folder / CHECKPOINT
        tag = tag_of(self.progress.step)
        if self.engine.rank == 0 and (folder / tag).exists():
            shutil.rmtree(folder / tag)  # of an earlier run: its files may have a second name in ckpt_model_best
        self.engine.barrier()
        self.engine.save(folder, tag, self.progress.as_dict())
        self.engine.barrier()
        if self.engine.rank == 0:
            remove_others(folder)
            if best:
                keep_as(folder, self.folder / BEST)
        self.engine.barrier()

    @contextmanager
    def _explain_interrupt(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            tag = latest_tag(self.folder / CHECKPOINT)
            kept = (
                f"the checkpoint {self.folder / CHECKPOINT / tag} is kept: the same command goes on from it"
                if tag
                else "no checkpoint yet"
            )
            raise KeyboardInterrupt(f"interrupted after step {self.progress.step}; {kept}") from None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def describe(report: StepReport) -> str:
    """A step in one short line."""
    parts = [f"loss {report.total:.3f}"] + [f"{name} {value:.3f}" for name, value in report.losses.items()]
    parts += [f"lr {report.learning_rate:.1e}", f"grad {report.gradient_norm:.2f}"]
    return " ".join(parts) + ("" if report.applied else " (overflow: step left out)")

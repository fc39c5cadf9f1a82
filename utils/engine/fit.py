"""The training loop: steps, curves, validation, checkpoints. It knows an engine and batches, nothing of the model."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.cli.atomic_files import open_atomic
from utils.cli.errors import Stopped, UserError
from utils.engine.base import Engine, StepReport
from utils.engine.checkpoints import copy_checkpoint, latest_tag
from utils.engine.lock import require_shared_folder
from utils.engine.nan_guard import NanGuard
from utils.engine.preflight import warn_below_chance
from utils.engine.sample_log import SampleLog, drop_later_steps, sample_numbers
from utils.engine.saving import find_checkpoint, load_checkpoint, random_state, restore_random_state, save_checkpoint
from utils.engine.stepping import Schedule
from utils.engine.stopping import StopRequest, under_launcher
from utils.engine.tensorboard_logger import TensorBoardLogger
from utils.engine.throughput import Throughput, profiler

logger = logging.getLogger(__name__)

CHECKPOINT, BEST = "ckpt_model", "ckpt_model_best"
VALIDATION = "validation.json"
Scores = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps; 0 is never, but for a checkpoint and a validation at the end.

    save_minutes: a checkpoint is due so long after the last one, too. keep_last: how many of them are kept.
    max_bad_steps: so many steps in a row may be left out because they are not finite; the run stops after them.
    samples_per_step: over all ranks and micro-batches, 0 where not known. A checkpoint is only resumed with the same.
    profile: so many steps, after the first two, are recorded in a trace.
    """

    schedule: Schedule
    total_steps: int
    save_every: int
    validate_every: int
    print_every: int = 1
    best_by: str = "giou"
    save_minutes: float = 0.0
    keep_last: int = 1
    max_bad_steps: int = 5
    samples_per_step: int = 0
    profile: int = 0


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    validated: the step of the last validation; a checkpoint is made before it, so that nothing hangs on it.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    scores: Scores = field(default_factory=dict)
    validated: int = 0
    samples_per_step: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Progress":
        return cls(**{entry.name: saved[entry.name] for entry in fields(cls) if entry.name in saved})


class Run:
    """One run in its folder: ckpt_model has the last checkpoints, ckpt_model_best the one with the best score."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        folder: Path,
        validate: Callable[[], Scores] | None = None,
        draw: Callable[[], dict[str, np.ndarray]] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """
        Args:
            validate: scores by name, the same on every rank; called in inference mode on all ranks together.
            draw: images by name, (H, W, 3) uint8; called on rank 0 after each validation, in inference mode.
            stop: where requests to stop arrive; by default this process's signals.
        """
        self.engine, self.plan, self.folder = engine, plan, folder
        self.validate, self.draw = validate, draw
        self.stop = stop or StopRequest(under_launcher())
        self.progress = Progress(samples_per_step=plan.samples_per_step)
        self.nan_guard = NanGuard(folder, engine, plan.max_bad_steps)
        self.sample_log = SampleLog(folder, engine.rank)
        self.throughput = Throughput(engine.device, engine.world_size)
        self._saved_at = time.monotonic()
        self._saved_step = 0

    def resume(self, checkpoint: Path) -> None:
        """Go on from the newest whole checkpoint in a folder, or from a checkpoint itself."""
        place = find_checkpoint(self.engine, checkpoint)
        progress = Progress.from_dict(load_checkpoint(self.engine, place))
        self._check_samples(place, progress)
        self.progress, self._saved_step = progress, progress.step
        self._take_validation(progress.step)
        logger.info(f"going on from step {progress.step} of {place}")

    def _check_samples(self, place: Path, progress: Progress) -> None:
        """The order of the data stays what it was only where steps have as many samples as before."""
        ours, theirs = self.plan.samples_per_step, progress.samples_per_step
        if ours and theirs and ours != theirs:
            raise UserError(
                f"the steps of {place} have {theirs} samples and those of this run {ours}: make ranks x --batch_size x "
                f"--grad_accumulation_steps come to {theirs} again, or start anew from its weights with --weight"
            )
        progress.samples_per_step = ours or theirs

    def _take_validation(self, step: int) -> None:
        """The scores of a validation at `step` that came after the checkpoint."""
        try:
            saved = json.loads((self.folder / VALIDATION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if saved.get("validated") == step == self.progress.step:
            self.progress = Progress.from_dict({**self.progress.as_dict(), **saved})

    def fit(self, batches: Callable[[int], Iterator[list[Any]]]) -> Progress:
        """Train to the plan's end. Asked to stop, makes a checkpoint, leaves the other ranks and raises Stopped.

        `batches(step)` yields each step's micro-batches from optimizer step `step` on.
        """
        first = self.progress.step
        require_shared_folder(self.folder, self.engine)
        if self.engine.rank == 0:
            drop_later_steps(self.folder, self._saved_step)
        self.engine.barrier()
        tensorboard = TensorBoardLogger(self.folder, first, self.engine.rank == 0)
        try:
            with self._explained(), self.stop.handle_signals():
                if first and self.progress.validated != first and self._validation_is_due():
                    self._validate(tensorboard)
                if first >= self.plan.total_steps:
                    total = self.plan.total_steps
                    logger.warning(f"this run of {total} steps is complete: raise --max_steps or --epochs to go on")
                else:
                    self._steps(batches(first), tensorboard)
                    logger.info(self.throughput.summary())
        finally:
            tensorboard.close()
            self.sample_log.close()
        return self.progress

    def evaluate(self) -> Scores:
        """Validate once, without training."""
        tensorboard = TensorBoardLogger(self.folder, 0, self.engine.rank == 0)
        try:
            self._score(tensorboard)
        finally:
            tensorboard.close()
        return self.progress.scores

    def _steps(self, batches: Iterator[list[Any]], tensorboard: TensorBoardLogger) -> None:
        plan, progress = self.plan, self.progress
        self.engine.model.train()
        hidden = self.engine.rank != 0
        self._saved_at = time.monotonic()
        bar = tqdm(total=plan.total_steps, initial=progress.step, disable=hidden, unit="step", dynamic_ncols=True)
        with bar, profiler(self.folder, 0 if hidden else plan.profile) as profile:
            while progress.step < plan.total_steps:
                began = time.perf_counter()
                micro_batches = next(batches)
                waited = time.perf_counter() - began
                report = self.engine.train_step(micro_batches, plan.schedule.rate(progress.step))
                spent = {"data": waited, **report.seconds}
                self.throughput.add(time.perf_counter() - began, micro_batches, spent)
                progress.step += 1
                self.sample_log.write(progress.step, sample_numbers(micro_batches), report)
                for sentence in self.nan_guard.check(progress.step, report, micro_batches):
                    self._say(sentence)
                tensorboard.step(progress.step, report)
                if progress.step % plan.print_every == 0:
                    bar.set_postfix_str(f"{format_report(report)} {self.throughput.describe()}", refresh=False)
                    tensorboard.throughput(progress.step, self.throughput.metrics())
                bar.update()
                if profile is not None:
                    profile.step()
                self._after_step(tensorboard)

    def _say(self, sentence: str) -> None:
        if self.engine.rank == 0:
            tqdm.write(sentence)

    def _after_step(self, tensorboard: TensorBoardLogger) -> None:
        """Save and validate where that is due, and stop where that was asked for."""
        stop, late = self._agree()
        last, validation = self.progress.step == self.plan.total_steps, self._validation_is_due()
        if last or validation or stop or late or _due(self.progress.step, self.plan.save_every):
            self._save()
        if stop:
            self.engine.close()
            raise Stopped(self._stopped(self.stop.reason or "another of its processes"))
        if validation:
            self._validate(tensorboard)

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether a checkpoint is late by rank 0's clock; the same on all."""
        minutes = self.plan.save_minutes
        late = self.engine.rank == 0 and 0 < minutes * 60 <= time.monotonic() - self._saved_at
        stop, late_anywhere = self.engine.add([float(self.stop.is_requested()), float(late)])
        return stop > 0, late_anywhere > 0

    def _validation_is_due(self) -> bool:
        last = self.progress.step == self.plan.total_steps
        return self.validate is not None and (last or _due(self.progress.step, self.plan.validate_every))

    def _stopped(self, why: str) -> str:
        place = self.folder / CHECKPOINT / (latest_tag(self.folder / CHECKPOINT) or "")
        return (
            f"stopped by {why} after step {self.progress.step} of {self.plan.total_steps}; everything is in {place}: "
            "the same command goes on from there"
        )

    def _validate(self, tensorboard: TensorBoardLogger) -> None:
        """Score what the last checkpoint holds, keep it where it is the best; a request to stop ends it half way."""
        progress = self.progress
        with self.stop.exit_on_request(self._stopped("{reason}")):
            better = self._score(tensorboard)
        progress.validated = progress.step
        if self.engine.rank == 0:
            if better:
                copy_checkpoint(self.folder / CHECKPOINT, self.folder / BEST)
            with open_atomic(self.folder / VALIDATION, sync=True) as file:
                json.dump(progress.as_dict(), file)

    def _score(self, tensorboard: TensorBoardLogger) -> bool:
        """Score, write down, and say whether this is the best so far. Training's random numbers are left alone."""
        if self.validate is None:
            return False
        progress, state = self.progress, random_state(self.engine.device)
        with self.engine.inference():
            progress.scores = self.validate()
            images = self.draw() if self.draw is not None and self.engine.rank == 0 else {}
        restore_random_state(state, self.engine.device)
        tensorboard.scores(progress.step, progress.scores)
        tensorboard.images(progress.step, images)
        self._say(f"step {progress.step}: " + ", ".join(f"{n} {v:.4f}" for n, v in progress.scores.items()))
        score = progress.scores.get(self.plan.best_by)
        if score is not None and progress.best is None and (warning := warn_below_chance(score)):
            self._say(warning)
        if score is None or (progress.best is not None and score <= progress.best):
            return False
        progress.best, progress.best_step = score, progress.step
        return True

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        folder = self.folder / CHECKPOINT
        save_checkpoint(self.engine, folder, self.progress.step, self.progress.as_dict(), self.plan.keep_last)
        self._saved_step, self._saved_at = self.progress.step, time.monotonic()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Ctrl-C where no step can be finished any more, and the end of a data worker, in a sentence each."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted after step {self.progress.step}; {self._kept()}") from None
        except RuntimeError as error:
            # Raised wherever this process happens to be when the system tells of a worker's death.
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a data worker ended after step {self.progress.step} ({str(error).splitlines()[0]}), as happens when "
                f"memory runs out: fewer --workers take less; {self._kept()}"
            ) from error

    def _kept(self) -> str:
        tag = latest_tag(self.folder / CHECKPOINT)
        if tag is None:
            return "no checkpoint yet"
        return f"the checkpoint {self.folder / CHECKPOINT / tag} is kept: the same command goes on from it"


def fit_without_resume(run: Run, batches: Callable[[int], Iterator[list[Any]]]) -> None:
    """Train where nothing goes on from a checkpoint: asked to stop, the whole job is interrupted."""
    try:
        run.fit(batches)
    except Stopped:
        raise KeyboardInterrupt("interrupted while training; the next start begins anew") from None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def format_report(report: StepReport) -> str:
    """A step in one short line."""
    parts = [f"loss {report.total:.3f}"] + [f"{name} {value:.3f}" for name, value in report.losses.items()]
    parts += [f"lr {report.learning_rate:.1e}", f"grad {report.gradient_norm:.2f}"]
    return " ".join(parts) + ("" if report.applied else " (not finite: left out)")

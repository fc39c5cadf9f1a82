"""What goes wrong in a run, and the end each fault has: steps that are not finite, damaged checkpoints, full and
read-only disks, requests to stop, two runs in a folder, clocks that go backwards, workers that are killed."""

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.engine_toys import ToyBatch, collate, cut, make_samples, make_toy
from utils.cli.errors import Stopped, UserError, run_script
from utils.data.bad_samples import BAD_SAMPLES
from utils.engine import checkpoints, fit
from utils.engine.base import StepReport
from utils.engine.checkpoints import latest_tag, tags
from utils.engine.fit import CHECKPOINT, Plan, Run
from utils.engine.lock import lock_folder
from utils.engine.nan_guard import DUMPS, SPIKES, NanGuard
from utils.engine.plain_engine import WEIGHTS, PlainEngine
from utils.engine.sample_log import drop_later_steps, read_consumed
from utils.engine.saving import random_state, restore_random_state
from utils.engine.stepping import OptimizerSettings, Schedule

CPU = torch.device("cpu")
STEPS = 6


def engine(seed: int = 0) -> PlainEngine:
    return PlainEngine(make_toy(seed), OptimizerSettings(), "fp32", CPU)


def plan(**changes: Any) -> Plan:
    settings = {"total_steps": STEPS, "save_every": 2, "validate_every": 0, "keep_last": 2} | changes
    return Plan(Schedule(1e-2, STEPS, 2), **settings)


def batches(first: int, before: Callable[[int, ToyBatch], None] | None = None) -> Iterator[list[ToyBatch]]:
    """Steps of two micro-batches of two samples; `before` may look at, or spoil, the first batch of each step."""
    for step in range(first, STEPS):
        micro_batches = cut(make_samples(4, seed=step + 1), 1, 2, 0)
        for number, batch in enumerate(micro_batches):
            numbers = (4 * step + 2 * number, 4 * step + 2 * number + 1)
            batch.info = [{"number": n, "sample_id": f"sample {n}", BAD_SAMPLES: []} for n in numbers]
        if before is not None:
            before(step, micro_batches[0])
        yield micro_batches


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.engine.model.parameters()]


def trained(folder: Path) -> Run:
    """A run of all steps, with two checkpoints left."""
    run = Run(engine(), plan(), folder)
    run.fit(batches)
    assert tags(folder / CHECKPOINT) == ["step6", "step4"]
    return run


# --- steps that are not finite ----------------------------------------------------------------------------------


def test_a_batch_with_nan_is_left_out_and_kept_for_looking_at(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def spoil(step: int, batch: ToyBatch) -> None:
        if step == 2:
            batch.features[0, 0] = math.nan

    run = Run(engine(), plan(), tmp_path)
    before: list[list[torch.Tensor]] = []

    def watched(first: int) -> Iterator[list[ToyBatch]]:
        for micro_batches in batches(first, spoil):
            before.append(weights(run))
            yield micro_batches

    progress = run.fit(watched)
    assert progress.step == STEPS and run.nan_guard.left_out == 1
    after = [*before[1:], weights(run)]
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]
    assert moved == [True, True, False, True, True, True]
    assert read_consumed(tmp_path) == [n for n in range(4 * STEPS) if n not in range(8, 12)]
    said = capsys.readouterr().out
    assert "step 3 is left out" in said and "sample 8, sample 9, sample 10, sample 11" in said
    dumped = torch.load(tmp_path / DUMPS / "step3_rank0.pt", weights_only=True)
    assert dumped["samples"] == [f"sample {n}" for n in range(8, 12)]
    assert torch.isnan(dumped["micro_batches"][0]["features"][0, 0])


def test_a_weight_that_is_nan_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(engine(), plan(max_bad_steps=3), tmp_path)

    def spoil(step: int, _: ToyBatch) -> None:
        if step == 2:
            with torch.no_grad():
                run.engine.model.head.weight[0, 0] = math.nan

    status = run_script(lambda _: run.fit(lambda first: batches(first, spoil)) and None, [])
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "3 steps in a row up to step 5 were not finite" in said and "--lr" in said
    # Of the checkpoints one is from before the weight went wrong, and nothing was written into it.
    again = Run(engine(), plan(), tmp_path)
    again.resume(tmp_path / CHECKPOINT / "step2")
    assert all(torch.isfinite(p).all() for p in weights(again)) and again.fit(batches).step == STEPS


def test_a_spike_is_written_down_with_its_samples(tmp_path: Path) -> None:
    guard = NanGuard(tmp_path, engine(), max_in_a_row=5)
    batch = next(batches(0))

    def report(total: float) -> StepReport:
        return StepReport({"ce": total}, total, {"ce": 1.0}, 1e-3, 1.0)

    # Losses between 1.00 and 1.09: median 1.045 at most, scatter 0.03, so that 1.2 is usual and 3 is not.
    for step in range(30):
        assert guard.check(step, report(1.0 + 0.01 * (step % 10)), batch) == []
    assert guard.check(30, report(1.2), batch) == []
    (sentence,) = guard.check(31, report(3.0), batch)
    assert "step 31: loss 3.000, usually 1.0" in sentence and "sample 0, sample 1" in sentence
    (line,) = (tmp_path / SPIKES).read_text().splitlines()
    assert json.loads(line)["samples"] == [f"sample {n}" for n in range(4)]


# --- checkpoints that are not what they were ---------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (cut_off, r"pytorch_model\.bin has [\d,]+ of [\d,]+ bytes"),
        (flip, "the bytes of pytorch_model.bin are not those that were written"),
        (Path.unlink, r"pytorch_model\.bin is missing"),
        (lambda path: (path.parent / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path.parent / "manifest.json").unlink(), r"manifest\.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    harm: Callable[[Path], object], why: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    straight = weights(trained(tmp_path))
    harm(tmp_path / CHECKPOINT / "step6" / WEIGHTS)
    again = Run(engine(seed=7), plan(), tmp_path)
    again.resume(tmp_path / CHECKPOINT)
    said = capsys.readouterr().err
    assert again.progress.step == 4 and "passed over the checkpoint" in said and "going on from step 4" in said
    assert re.search(why, said), said
    again.fit(batches)
    assert all(torch.equal(a, b) for a, b in zip(straight, weights(again), strict=True))
    assert checkpoints.find_problem(tmp_path / CHECKPOINT / "step6") is None
    assert read_consumed(tmp_path) == list(range(4 * STEPS))


def test_a_run_without_a_whole_checkpoint_does_not_start_anew_by_itself(tmp_path: Path) -> None:
    trained(tmp_path)
    for tag in ("step4", "step6"):
        flip(tmp_path / CHECKPOINT / tag / WEIGHTS)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(step6: .*; step4: .*\): .*--no_auto_resume"):
        Run(engine(), plan(), tmp_path).resume(tmp_path / CHECKPOINT)


def test_nothing_goes_before_its_successor_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    again = Run(engine(), plan(keep_last=1), tmp_path)
    again.resume(tmp_path / CHECKPOINT / "step4")
    checksum = checkpoints.checksum
    read: list[Path] = []

    def lies(path: Path) -> str:
        read.append(path)
        return checksum(path) if len(read) <= 3 else "another"

    # The three files are read once to write_manifest them, and wrongly when they are read back.
    monkeypatch.setattr(checkpoints, "checksum", lies)
    with pytest.raises(UserError, match=r"was not written as it should be: the bytes of .* earlier ones are kept"):
        again.fit(batches)
    monkeypatch.undo()
    assert tags(tmp_path / CHECKPOINT) == ["step6", "step4"]
    assert [checkpoints.find_problem(tmp_path / CHECKPOINT / tag) for tag in ("step6", "step4")] == [None, None]


def test_a_run_that_starts_anew_keeps_the_old_one_until_it_has_its_own(tmp_path: Path) -> None:
    trained(tmp_path)
    fresh = Run(engine(seed=3), plan(total_steps=1), tmp_path)
    fresh.fit(batches)
    assert tags(tmp_path / CHECKPOINT) == ["step1"] and latest_tag(tmp_path / CHECKPOINT) == "step1"


# --- disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_ends_the_run_in_a_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save = torch.save

    def refuse(value: Any, path: Path) -> None:
        if "step4" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        save(value, path)

    monkeypatch.setattr(torch, "save", refuse)
    assert run_script(lambda _: Run(engine(), plan(), tmp_path).fit(batches) and None, []) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot write the checkpoint" in said and os.strerror(number) in said and "the same command goes on" in said
    assert tags(tmp_path / CHECKPOINT) == ["step2"]
    monkeypatch.undo()
    again = Run(engine(seed=9), plan(), tmp_path)
    again.resume(tmp_path / CHECKPOINT)
    again.fit(batches)
    assert read_consumed(tmp_path) == list(range(4 * STEPS))


def test_space_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights and two moments of the toy: 4 bytes for each of its numbers, 8 more for those that train.
    numbers = [(p.numel(), p.requires_grad) for p in make_toy().parameters()]
    needed = sum(4 * count + 8 * count * trains for count, trains in numbers)
    usage = checkpoints.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match="no space for a checkpoint in"):
        Run(engine(), plan(), tmp_path).fit(batches)
    assert tags(tmp_path / CHECKPOINT) == []
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    Run(engine(), plan(total_steps=1), tmp_path).fit(batches)
    assert tags(tmp_path / CHECKPOINT) == ["step1"]


# --- requests to stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_keeps_it_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    straight = Run(engine(), plan(), tmp_path / "straight")
    straight.fit(batches)

    def send(step: int, _: ToyBatch) -> None:
        if step == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    run = Run(engine(), plan(), tmp_path / "stopped")
    assert run_script(lambda _: run.fit(lambda first: batches(first, send)) and None, []) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped by {number.name} after step 3 of 6" in said and "the same command goes on" in said
    assert tags(tmp_path / "stopped" / CHECKPOINT) == ["step3", "step2"]
    again = Run(engine(seed=9), plan(), tmp_path / "stopped")
    again.resume(tmp_path / "stopped" / CHECKPOINT)
    again.fit(batches)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(again), strict=True))
    assert read_consumed(tmp_path / "stopped") == list(range(4 * STEPS))


SECOND = """
import os, signal, sys, time
from pathlib import Path
from tests.unit.test_engine_guards import batches, engine, plan
from utils.engine.fit import Run
from utils.cli.errors import run_script

def slow(step, batch):
    if step == 2:
        print("in step 3", flush=True)
        time.sleep(60)

sys.exit(run_script(lambda _: Run(engine(), plan(), Path(sys.argv[1])).fit(lambda f: batches(f, slow)) and None, []))
"""


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", SECOND, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stdout.readline() == "in step 3\n"
    started.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert started.poll() is None, "the first waits for the step"
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=30)
    assert started.returncode == 128 + signal.SIGTERM and "SIGTERM again: leaving at once" in said
    assert latest_tag(tmp_path / CHECKPOINT) == "step2"


def test_a_signal_during_validation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint comes first, so the process may end in the middle; the scores are made when the run goes on."""

    class Left(BaseException):
        pass

    def leave(status: int) -> None:
        raise Left

    def validate() -> dict[str, float]:
        if again is None:
            run.stop._hear(signal.SIGTERM)
        return {"giou": 0.5}

    again = None
    monkeypatch.setattr("utils.engine.stopping.os._exit", leave)
    run = Run(engine(), plan(validate_every=2), tmp_path, validate)
    with pytest.raises(Left):
        run.fit(batches)
    assert latest_tag(tmp_path / CHECKPOINT) == "step2" and not (tmp_path / fit.BEST).exists()
    again = Run(engine(), plan(validate_every=2), tmp_path, validate)
    again.resume(tmp_path / CHECKPOINT)
    again.fit(batches)
    assert latest_tag(tmp_path / fit.BEST) == "step2" and again.progress.best_step == 2


def test_a_checkpoint_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes pass at step 3; the clock that is read cannot be set back, unlike the one on the wall."""
    now = [1000.0]
    monkeypatch.setattr(fit.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", iter(range(10**9, 0, -(10**6))).__next__)

    def wait(step: int, _: ToyBatch) -> None:
        now[0] += 120.0 if step == 2 else 1.0

    run = Run(engine(), plan(save_every=0, save_minutes=1.0, keep_last=5), tmp_path)
    run.fit(lambda first: batches(first, wait))
    assert tags(tmp_path / CHECKPOINT) == ["step6", "step3"]


def test_a_run_goes_on_though_the_clock_went_backwards(tmp_path: Path) -> None:
    """The newest checkpoint is the one with most steps, whatever its files say about when they were written."""
    trained(tmp_path)
    os.utime(tmp_path / CHECKPOINT / "step6", (1, 1))
    again = Run(engine(), plan(), tmp_path)
    again.resume(tmp_path / CHECKPOINT)
    assert again.progress.step == 6


# --- neighbours --------------------------------------------------------------------------------------------------


HOLD = """
import sys, time
from pathlib import Path
from utils.engine.lock import lock_folder
from utils.cli.errors import run_script

def main(_):
    lock_folder(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)

sys.exit(run_script(main, []))
"""


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=r"is in use by another run: .*choose another"):
        lock_folder(tmp_path)
    first.kill()
    first.wait()
    lock_folder(tmp_path)  # whoever is killed holds nothing any more
    lock_folder(tmp_path)


def test_a_worker_that_is_killed_ends_the_run_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def die(step: int, _: ToyBatch) -> None:
        if step == 3:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    assert run_script(lambda _: Run(engine(), plan(), tmp_path).fit(lambda f: batches(f, die)) and None, []) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "worker (pid 7) is killed by signal" in said and "step2 is kept: the same command goes on" in said


def test_steps_of_another_size_are_refused(tmp_path: Path) -> None:
    Run(engine(), plan(samples_per_step=4), tmp_path).fit(batches)
    with pytest.raises(UserError, match="have 4 samples and those of this run 8: make ranks x --batch_size x"):
        Run(engine(), plan(samples_per_step=8), tmp_path).resume(tmp_path / CHECKPOINT)


def test_every_random_state_comes_back(tmp_path: Path) -> None:
    state = random_state(CPU)
    torch.save(state, tmp_path / "state.pt")

    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]  # noqa: NPY002

    drawn = draw()
    assert draw() != drawn
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert draw() == drawn


def test_the_sample_log_drops_what_is_done_again(tmp_path: Path) -> None:
    Run(engine(), plan(), tmp_path).fit(batches)
    path = tmp_path / "samples" / "rank0.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "sam')
    drop_later_steps(tmp_path, 4)
    assert read_consumed(tmp_path) == list(range(16))


def test_stopped_is_no_failure(capsys: pytest.CaptureFixture) -> None:
    def main(_: Any) -> None:
        raise Stopped("kept")

    assert run_script(main, []) == 0 and capsys.readouterr().err.strip() == "kept"


def test_collated_toys_have_no_numbers() -> None:
    """What does not say its number is not written down as one."""
    assert fit.sample_numbers([collate(make_samples(2))]) == []

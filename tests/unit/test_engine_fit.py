"""The loop: progress, checkpoints, best and latest, resume, curves, interruption, a full disk, the run card."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.structures import PixelLMError
from tests.unit.engine_toys import ToyBatch, cut, make_samples, make_toy
from utils.cli.errors import UserError, explain, run_script
from utils.cli.run_card import find_run_card, git_state, write_run_card
from utils.engine import plain_engine, prepare
from utils.engine.checkpoints import copy_checkpoint, latest_tag, remove_superseded, set_latest, tag_for, write_manifest
from utils.engine.fit import BEST, CHECKPOINT, Plan, Run
from utils.engine.plain_engine import PlainEngine
from utils.engine.runtime import deepspeed_problem, open_runtime
from utils.engine.stepping import OptimizerSettings, Schedule

CPU = torch.device("cpu")
STEPS = 6


def engine(seed: int = 0) -> PlainEngine:
    return PlainEngine(make_toy(seed), OptimizerSettings(), "fp32", CPU)


def batches(first: int) -> Iterator[list[ToyBatch]]:
    step = first
    while True:
        yield cut(make_samples(4, seed=step + 1), 1, 2, 0)
        step += 1


def plan(**changes: Any) -> Plan:
    settings = {"total_steps": STEPS, "save_every": 2, "validate_every": 2} | changes
    return Plan(Schedule(1e-2, STEPS, 2), **settings)


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.engine.model.parameters()]


def test_a_run_leaves_latest_best_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scores = iter([0.2, 0.5, 0.3])
    modes = []

    def validate() -> dict[str, float]:
        modes.append((run.engine.model.training, torch.is_grad_enabled()))
        return {"giou": next(scores)}

    image = np.zeros((4, 6, 3), dtype=np.uint8)
    run = Run(engine(), plan(), tmp_path, validate, lambda: {"answers/0": image})
    progress = run.fit(batches)
    assert (progress.step, progress.best, progress.best_step) == (STEPS, 0.5, 4)
    assert modes == [(False, False)] * 3 and run.engine.model.training
    latest, best = tmp_path / CHECKPOINT, tmp_path / BEST
    assert (latest_tag(latest), latest_tag(best)) == ("step6", "step4")
    assert sorted(p.name for p in latest.iterdir()) == ["latest", "step6"]
    assert sorted(p.name for p in best.iterdir()) == ["latest", "step4"]
    state = torch.load(latest / "step6" / plain_engine.WEIGHTS, weights_only=True)
    assert state.keys() == run.engine.model.state_dict().keys()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    names = {"loss/ce", "loss/mask", "loss/total", "train/learning_rate", "train/gradient_norm", "validation/giou"}
    found = {name for name in events.Tags()["scalars"] if name.split("/")[0] not in {"speed", "seconds", "memory"}}
    assert found == names and events.Tags()["images"] == ["answers/0"]
    assert [e.step for e in events.Scalars("loss/total")] == list(range(1, STEPS + 1))
    assert [e.value for e in events.Scalars("train/learning_rate")][:2] == pytest.approx([5e-3, 1e-2])
    assert [e.step for e in events.Scalars("validation/giou")] == [2, 4, 6]
    assert "giou 0.5000" in capsys.readouterr().out


def test_a_resumed_run_ends_where_the_straight_one_does(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    straight = Run(engine(), plan(), tmp_path / "straight")
    straight.fit(batches)
    first = Run(engine(), plan(total_steps=4), tmp_path / "halves")
    first.fit(batches)
    second = Run(engine(seed=5), plan(), tmp_path / "halves")
    second.resume(tmp_path / "halves" / CHECKPOINT)
    assert second.progress.step == 4 and "going on from step 4" in capsys.readouterr().err
    time.sleep(1.0)  # TensorBoard reads event files in the order of the second in their names
    second.fit(batches)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(second), strict=True))
    events = EventAccumulator(str(tmp_path / "halves"))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss/total")]
    assert steps[-1] == STEPS and all(a < b for a, b in pairwise(steps))


def test_a_checkpoint_of_an_earlier_version_is_taken_on(tmp_path: Path) -> None:
    straight, resumed = (Run(engine(seed=9 * n), plan(), tmp_path / str(n)) for n in range(2))
    straight.engine.model.load_state_dict(make_toy().state_dict())
    straight.fit(batches)
    resumed.resume(Path(__file__).resolve().parents[1] / "fixtures" / "old_checkpoints" / "plain")
    assert (resumed.progress.step, resumed.progress.best) == (2, None)
    resumed.fit(batches)
    for one, other in zip(weights(straight), weights(resumed), strict=True):
        torch.testing.assert_close(one, other)


def test_a_fresh_run_in_an_old_folder_leaves_the_old_best_whole(tmp_path: Path) -> None:
    first = Run(engine(), plan(total_steps=2), tmp_path, lambda: {"giou": 0.5})
    first.fit(batches)
    best = tmp_path / BEST / "step2" / plain_engine.WEIGHTS
    before = best.read_bytes()
    Run(engine(seed=9), plan(total_steps=2), tmp_path).fit(batches)
    assert best.read_bytes() == before
    assert (tmp_path / CHECKPOINT / "step2" / plain_engine.WEIGHTS).read_bytes() != before


def test_a_checkpoint_that_does_not_fit_says_so(tmp_path: Path) -> None:
    run = Run(engine(), plan(total_steps=2), tmp_path)
    run.fit(batches)
    other = engine()
    other.model.head = torch.nn.Linear(6, 9)
    with pytest.raises(UserError, match=r"does not fit this model .*head\.weight"):
        Run(other, plan(), tmp_path).resume(tmp_path / CHECKPOINT)
    with pytest.raises(UserError, match="there is no checkpoint in"):
        Run(engine(), plan(), tmp_path).resume(tmp_path / "elsewhere")
    (tmp_path / CHECKPOINT / "step2" / plain_engine.STATE).unlink()
    with pytest.raises(UserError, match=r"is whole \(step2: training_state\.pt is missing\): .*--no_auto_resume"):
        Run(engine(), plan(), tmp_path).resume(tmp_path / CHECKPOINT)
    write_manifest(tmp_path / CHECKPOINT / "step2")
    with pytest.raises(UserError, match="was not written by the plain engine"):
        Run(engine(), plan(), tmp_path).resume(tmp_path / CHECKPOINT)


def test_ctrl_c_says_where_the_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def stopped(first: int) -> Iterator[list[ToyBatch]]:
        source = batches(first)
        for _ in range(3):
            yield next(source)
        raise KeyboardInterrupt

    status = run_script(lambda _: Run(engine(), plan(), tmp_path).fit(stopped) and None, [])
    said = capsys.readouterr().err
    assert status == 130 and "interrupted after step 3" in said and "step2 is kept" in said
    assert run_script(lambda _: Run(engine(), plan(save_every=0), tmp_path / "b").fit(stopped) and None, []) == 130
    assert "no checkpoint yet" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save, calls = torch.save, []

    def full(value: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 3:  # a checkpoint has three files
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(value, path)

    monkeypatch.setattr(plain_engine.torch, "save", full)
    status = run_script(lambda _: Run(engine(), plan(), tmp_path).fit(batches) and None, [])
    said = capsys.readouterr().err.splitlines()
    assert status == 2 and "No space left on device" in said[-1] and "step4" in said[-1]
    assert latest_tag(tmp_path / CHECKPOINT) == "step2"
    monkeypatch.undo()
    again = Run(engine(), plan(), tmp_path)
    again.resume(tmp_path / CHECKPOINT)
    assert again.fit(batches).step == STEPS and latest_tag(tmp_path / CHECKPOINT) == "step6"


def test_torch_wraps_a_full_disk_and_it_is_still_one_sentence(tmp_path: Path) -> None:
    """A file-size limit makes torch's own writer fail, as a full disk does."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.unit.test_engine_fit import engine\n"
        "from utils.engine.saving import save_checkpoint\n"
        "from utils.cli.errors import run_script\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "big = engine()\n"
        "big.model.large = torch.nn.Parameter(torch.zeros(300_000))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.exit(run_script(lambda _: save_checkpoint(big, Path({str(tmp_path)!r}), 1, {{}}), []))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "step1" in done.stderr.splitlines()[-1]
    assert latest_tag(tmp_path) is None


def test_checkpoint_folders(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt_model"
    for step in (1, 2):
        (folder / tag_for(step)).mkdir(parents=True)
        (folder / tag_for(step) / "weights").write_text(str(step))
    remove_superseded(folder)
    assert (folder / "step1").is_dir()
    set_latest(folder, "step2")
    (folder / "zero_to_fp32.py").write_text("")
    (folder / "my_notes").mkdir()
    remove_superseded(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "my_notes", "step2", "zero_to_fp32.py"]
    copy_checkpoint(folder, tmp_path / "best")
    copy_checkpoint(folder, tmp_path / "best")
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["latest", "step2", "zero_to_fp32.py"]
    (folder / "step2" / "weights").unlink()
    assert (tmp_path / "best" / "step2" / "weights").read_text() == "2"
    set_latest(folder, "step3")
    assert latest_tag(folder) is None


def test_the_run_card_is_found_from_what_training_left(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    write_run_card(run, arguments={"lora_r": 4}, facts={"engine": "plain"})
    (run / CHECKPOINT / "step2").mkdir(parents=True)
    (run / "pytorch_model.bin").mkdir()
    for start in (run, run / CHECKPOINT / "step2", run / "pytorch_model.bin" / "pytorch_model.bin"):
        card = find_run_card(start)
        assert card is not None and card["arguments"] == {"lora_r": 4} and card["engine"] == "plain"
    assert card["versions"]["torch"] and git_state(tmp_path)["commit"] is None
    assert find_run_card(tmp_path / "runs", levels=0) is None
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        find_run_card(run)
    write_run_card(run, arguments={}, facts={})
    assert set(json.loads((run / "run.json").read_text())) == {"arguments", "started", "versions", "git"}


def test_which_engine_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert open_runtime("auto", 0, "fp32").engine == "plain"
    assert open_runtime("deepspeed", -1, "fp32").engine == "deepspeed"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        open_runtime("auto", 0, "fp16")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert open_runtime("auto", 0, "fp32").engine == "deepspeed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_runtime("auto", 0, "fp32").engine == "plain"
    assert "DeepSpeed is not installed" in capsys.readouterr().err
    with pytest.raises(UserError, match="DeepSpeed is not installed"):
        open_runtime("deepspeed", 0, "fp32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"DeepSpeed is not installed .*; without it, add --engine plain"):
        open_runtime("auto", 0, "fp32")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "needs g++ and ninja" in str(deepspeed_problem(CPU))


def test_setting_up_compiles_once_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A compiler that is broken stops the set-up; none at all does not, as the plain engine needs none."""
    problem = deepspeed_problem(CPU)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    if problem is None:
        done = subprocess.run(
            [sys.executable, "-m", "utils.engine.prepare"],
            env={**os.environ, "CXX": "/bin/false"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "repair the C++ compiler" in done.stderr and "/bin/false" in done.stderr
        assert "Traceback" not in done.stderr
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert prepare.main() is None
    assert "g++" in capsys.readouterr().err


def test_bits_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --deterministic asks of torch; whether bits do repeat is told by the runs that are killed."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled()
    try:
        open_runtime("plain", 0, "fp32")
        assert not torch.are_deterministic_algorithms_enabled()
        open_runtime("plain", 0, "fp32", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)


def test_only_a_users_error_becomes_a_sentence(capsys: pytest.CaptureFixture) -> None:
    class Known(PixelLMError):
        """An error of another room."""

    def fail(error: BaseException) -> int:
        def main(_: Any) -> None:
            raise error

        return run_script(main, [])

    assert fail(Known("what was found,\n what to do")) == 2
    assert "what was found, what to do" in capsys.readouterr().err
    assert fail(KeyboardInterrupt()) == 130
    for mistake in (ValueError("mistake"), KeyError("k"), OSError(errno.ENOENT, "gone")):
        assert explain(mistake) is None
        with pytest.raises(type(mistake)):
            fail(mistake)
    assert run_script(lambda _: None, []) == 0 and run_script(lambda _: 3, []) == 3

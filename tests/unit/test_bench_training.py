"""The bench of training: the model is of the size it says, its steps are measured, the table reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import training as script
from tools.bench.baselines import measured_model
from tools.bench.measured_training import TRAINED_SHAPES, batch_to_train, model_to_train

CPU = torch.device("cpu")


def test_the_large_model_is_of_the_releases_size() -> None:
    with torch.device("meta"):
        model = measured_model(TRAINED_SHAPES["7b"])
    # Llama-7B has 6.74 G numbers, the tower 0.30 G, the rest is projectors, codebook and decoder.
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(7.15e9, rel=0.01)


def test_a_batch_of_several_images_is_that_of_one_several_times() -> None:
    model, trained = model_to_train(TRAINED_SHAPES["tiny"], CPU, checkpointing=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}
    assert any("lora_A" in name for name in trained)
    model = model.float().eval()
    one, three = (model.count_losses(**batch_to_train(model, images)) for images in (1, 3))
    assert three == {name: 3 * count for name, count in one.items()} and one["bce"] == 3
    with torch.no_grad():
        losses = [model(**batch_to_train(model, images)).losses for images in (1, 3)]
    for name, term in losses[0].items():
        assert float(losses[1][name].sum) == pytest.approx(3 * float(term.sum), rel=1e-4)


def test_a_setting_is_measured(capsys: pytest.CaptureFixture) -> None:
    script.main(["--size=tiny", "--steps=2", "--engine=plain", "--case", "2", "on"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["engine"] == "plain" and found["flops_per_image"] > 1e8
    parts = [found[f"seconds/{part}"] for part in ("forward", "backward", "optimizer", "other")]
    assert min(parts) >= 0 and sum(parts) <= 1.001 * found["seconds_per_step"]
    assert found["speed/images_per_second"] == pytest.approx(2 / found["seconds_per_step"])
    lines = script.table({"2 on": found, "4 off": {"failed": "out of memory"}}).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "| 2 | on |" in lines[2] and "out of memory" in lines[3]


def test_memory_that_does_not_suffice_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(script, "measured", full)
    assert script.case(script.Setting("tiny", 1, True, 1), "plain") == {"failed": "out of memory"}


@pytest.mark.long
def test_the_bench_runs_from_end_to_end(tmp_path: Path, repository: Path, child_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tools.bench.training", "--batches=1", "--steps=1", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=repository, env=child_env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "training.json").read_text())
    assert list(written["cases"]) == ["1 on", "1 off"]
    assert {found["engine"] for found in written["cases"].values()} == {"deepspeed"}

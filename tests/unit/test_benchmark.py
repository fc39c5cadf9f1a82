"""The bench: its baselines do what they say, its numbers mean what they say."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.bench import baselines
from tools.bench import measure as benchmark


@pytest.fixture(scope="module")
def model() -> baselines.PixelLMForCausalLM:
    return baselines.measured_model(baselines.SHAPES["smoke"])


def test_the_measured_model_is_of_the_releases_shape() -> None:
    with torch.device("meta"):
        full = baselines.measured_model(baselines.SHAPES["full"])
    assert 160e6 < sum(one.numel() for one in full.parameters()) < 180e6
    assert full.config.image_size == 448 and full.config.num_image_tokens == 256 and full.config.group_size == 6
    # Twelve layers of four square maps and three of the MLP, their norms, the last norm, the head; not the embeddings.
    layers = 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768)
    assert baselines.bytes_read_per_token(full) == 4 * (layers + 768 + 32008 * 768)


def test_an_answer_has_its_length_and_targets(model: baselines.PixelLMForCausalLM) -> None:
    group = model.config.seg_token_ids
    for length, targets in [(58, 3), (58, 0), (7, 1), (240, 34)]:
        ids = baselines.measured_answer(model, length, targets)
        assert len(ids) == length and ids[-1] == baselines.END_TOKEN
        assert sum(ids[place : place + 6] == group for place in range(length)) == targets
        assert sum(token in group for token in ids) == 6 * targets
    with pytest.raises(ValueError, match="2 targets need 13 tokens"):
        baselines.measured_answer(model, 12, 2)


def test_all_ways_answer_alike(model: baselines.PixelLMForCausalLM) -> None:
    count, length = 2, 9
    ours = baselines.answered(model, baselines.ours, count, length, 1)
    assert [len(one.low_res_mask_logits) for one in ours.answers] == [1] * count
    for way in (baselines.plain_cache, baselines.release_without_cache):
        other = baselines.answered(model, way, count, length, 1)
        found = baselines.apart(ours, other)
        assert found["same_text"] and found["mask_logits"] < 3e-5
        # What is compared is what the model itself would have said after every token of every prompt.
        assert len(other.wanted) == length * count and len(set(other.wanted.values())) > 1
    shifted = baselines.Answered(ours.answers, {**ours.wanted, next(iter(ours.wanted)): -1})
    assert not baselines.apart(ours, shifted)["same_text"]


def test_both_training_steps_have_one_loss_and_gradient() -> None:
    model, batch = baselines.trainable_model(baselines.SHAPES["smoke"])
    assert batch["input_ids"].shape == (3, 80 + 1) and (batch["labels"] != -100).any(dim=1).all()
    gradients = []
    for step in (baselines.training_step, baselines.release_training_step):
        model.zero_grad()
        loss = step(model, batch)
        gradients.append((float(loss), model.get_output_embeddings().weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    scale = float(gradients[0][1].abs().max())
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-3 * scale)
    assert model.shares_prefixes


def test_ways_take_turns_and_the_middle_counts() -> None:
    done: list[str] = []

    def way(name: str, seconds: float) -> None:
        done.append(name)
        time.sleep(seconds)

    found = benchmark.interleaved({"a": lambda: way("a", 0.0), "b": lambda: way("b", 0.01)}, {"a": 3, "b": 1})
    assert done == ["a", "b", "a", "a"]
    assert found["a"]["runs"] == 3 and found["b"]["runs"] == 1 and found["b"]["median"] >= 0.01
    assert benchmark.spread([3.0, 1.0, 8.0]) == {"median": 3.0, "least": 1.0, "most": 8.0, "runs": 3.0}
    assert set(benchmark.beside({"x": lambda: None})) == {"x"}
    # 240 more take 3 - 1 seconds more.
    assert benchmark.rate({"16": 1.0, "256": 3.0, "64": 9.0}) == 120


def test_parts_are_told_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    phases = benchmark.Phases()
    assert phases.do("sleeping", lambda: time.sleep(0.01) or 7) == 7
    assert 0.01 <= phases.seconds["sleeping"] < 60
    assert capsys.readouterr().err == "sleeping took 0 s, 0 s since the start\n"


def test_a_peak_is_counted_from_where_it_was_forgotten(child_env: dict[str, str]) -> None:
    # 64 MiB before that do not count, 32 MiB after do.
    script = """
from tools.bench.measure import forget_peak, peak_bytes
import json
before = bytearray(b"x") * 2**26
del before
loaded = forget_peak()
after = bytearray(b"x") * 2**25
print(json.dumps({"over": peak_bytes() - loaded}))
"""
    found = benchmark.peaks([sys.executable, "-c"], [script])[script]
    assert 2**25 * 0.9 < found["over"] < 2**25 * 1.3
    assert benchmark.bandwidth(megabytes=1, runs=1) > 0


@pytest.mark.long
def test_the_bench_runs_from_end_to_end(tmp_path: Path, repository: Path, child_env: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "tools.bench.answering",
        "--size",
        "smoke",
        "--out",
        str(tmp_path),
        "--threads",
        "1",
    ]
    done = subprocess.run(command, cwd=repository, env=child_env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["wrong"] == [] and found["answer_speedup_without_cache"] > 1
    assert set(found["costs"]) == {"tokens", "targets", "questions", "images"}
    assert found["compiled"]["answer_seconds"] > 0 and found["compiled"]["said"]
    assert list(found["phases"]) == ["answering", "decoding steps", "training", "memory", "costs", "compiling"]
    assert found["memory"]["train_release"]["over_loaded"] > 0

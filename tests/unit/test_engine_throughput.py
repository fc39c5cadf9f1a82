"""Where a step's time goes, how fast it is, and what a probe counts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.engine_toys import CLASSES, WIDTH, ToyBatch, collate, cut, make_samples, make_toy
from utils.engine import throughput
from utils.engine.fit import Plan, Run
from utils.engine.plain_engine import PlainEngine
from utils.engine.probe import probe_gradients
from utils.engine.stepping import OptimizerSettings, Schedule
from utils.engine.throughput import StepTimer, Throughput

CPU = torch.device("cpu")


class Words(ToyBatch):
    """A toy batch that says how many tokens it has."""

    attention_mask = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 20.0, 20.5, 30.0, 32.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    clock = StepTimer(CPU)
    for name in ("forward", "backward", "forward"):
        with clock(name):
            pass
    assert clock.read() == {"forward": 3.0, "backward": 0.5} and clock.read() == {}


def test_figures_by_hand() -> None:
    batch = Words(*vars(collate(make_samples(2))).values())
    batch.info = [{}, {}]
    found = Throughput(CPU, ranks=3, flops_per_image=5e9)
    assert found.metrics() == {} and found.describe() == "" and found.summary() == ""
    found.peak = 1e11
    found.add(2.0, [batch], {"data": 0.5, "forward": 1.0})
    found.add(1.0, [batch, batch], {"data": 0.1, "forward": 0.6})
    figures = found.metrics()
    # 2 + 4 images and 4 + 8 tokens in 3 s on each of 3 ranks.
    assert figures["speed/images_per_second"] == pytest.approx(6.0)
    assert figures["speed/tokens_per_second"] == pytest.approx(12.0)
    # A rank does 2 images a second of 5e9 operations: 1e10 of 1e11.
    assert figures["speed/mfu"] == pytest.approx(0.1)
    split = {name: figures[f"seconds/{name}"] for name in ("data", "forward", "other")}
    assert split == pytest.approx({"data": 0.3, "forward": 0.8, "other": 0.4})
    assert figures["memory/peak_gib"] > 0.01
    assert found.describe() == "6.0 pic/s 12 tok/s mfu 10%"
    assert "data 300 ms, forward 800 ms, other 400 ms" in found.summary()


def test_the_probe_counts_matrix_products() -> None:
    """Forward 2·rows·in·out for every product, backward as much for each gradient that is asked for."""
    toy, rows = make_toy(warm=True), 8
    samples = [(features, 1, targets) for features, _, targets in make_samples(rows)]
    trains = [name for name, p in toy.named_parameters() if p.requires_grad]
    found = probe_gradients(toy, collate(samples), trains, "fp32", CPU)
    base, adapter = WIDTH * WIDTH, WIDTH * 2
    head, masks = WIDTH * CLASSES, WIDTH
    forward = base + 2 * adapter + head + masks
    # B: its weight and what goes on to A; A: its weight; head and masks: weight and what goes on to B. The frozen base
    # gets none, and nothing goes on to the features.
    backward = 2 * adapter + adapter + 2 * head + 2 * masks
    assert found == 2 * rows * (forward + backward)


def test_a_run_writes_its_costs_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def batches(first: int) -> Iterator[list[ToyBatch]]:
        for step in range(first, 5):
            micro_batches = cut(make_samples(4, seed=step), 1, 2, 0)
            for batch in micro_batches:
                batch.info = [{}, {}]
            yield micro_batches

    engine = PlainEngine(make_toy(), OptimizerSettings(), "fp32", CPU)
    plan = Plan(Schedule(1e-2, 5), total_steps=5, save_every=0, validate_every=0, profile=2)
    Run(engine, plan, tmp_path).fit(batches)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    names = set(events.Tags()["scalars"])
    parts = ("data", "forward", "backward", "optimizer", "communication", "other")
    assert {f"seconds/{part}" for part in parts} | {"speed/images_per_second", "memory/peak_gib"} <= names
    assert len(list((tmp_path / "trace").glob("*.json"))) == 1
    said = capsys.readouterr().err
    assert "pic/s" in said and "a step of the last 5: " in said


def test_peaks_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert throughput.peak_flops(CPU) is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("unknown", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert throughput.peak_flops(torch.device("cuda", 0)) == peak

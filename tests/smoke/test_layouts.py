"""One loss, however a run is laid out: engines, ZeRO stages, offload, ranks, rounds, recomputed activations; and going
on under another layout than the one that was killed."""

import contextlib
import dataclasses
import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from demo.tiny import make_tiny
from tests.smoke.conftest import ROOT, Trainer, training_flags
from tests.unit.tiny_pixellm import SHAPE, TEXTS
from utils.checkpoints.builder import save_model
from utils.engine.sample_log import read_consumed, read_losses

STEPS, SAMPLES = 10, 4
# Words alone, one target and several: some micro-batches have no target at all.
DATA = ("--dataset=refer_seg||vqa", "--sample_rates=1,1", "--num_classes_per_sample=2")
FLAGS = (*DATA, f"--max_steps={STEPS}", f"--steps_per_epoch={STEPS}", "--lr=1e-4", "--no-gradient_checkpointing")
# The learning rates give both about the same first step.
OPTIMIZERS = {"adamw": (1e-3, ()), "sgd": (1e-4, ("--lr=1e-2",))}
OFFLOAD = {
    "offload_optimizer": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "offload_parameters": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag for a tiny base in which rounding stays small: the decoder's last norm stands over four channels; over
    two, as in the other tests, it is all but a step function."""
    folder = tmp_path_factory.mktemp("smooth") / "base"
    with contextlib.redirect_stderr(io.StringIO()):
        built = make_tiny(TEXTS, dataclasses.replace(SHAPE, embedding_dim=32), seed=0)
        save_model(built.model, built.processor, folder)
    return f"--version={folder}"


def cut(ranks: int, rounds: int) -> tuple[str, ...]:
    """SAMPLES images a step over so many ranks and rounds."""
    return f"--batch_size={SAMPLES // (ranks * rounds)}", f"--grad_accumulation_steps={rounds}"


def zero(stage: int) -> tuple[str, ...]:
    return "--engine=deepspeed", f"--zero_stage={stage}"


CASES = {
    "plain in 2 rounds": (1, 2, ("--engine=plain",)),
    "plain in 4 rounds": (1, 4, ("--engine=plain",)),
    "plain recomputing": (1, 1, ("--engine=plain", "--gradient_checkpointing")),
    "plain on 2 ranks": (2, 1, ("--engine=plain",)),
    "plain on 2 ranks in 2 rounds": (2, 2, ("--engine=plain",)),
    "stage 0": (2, 1, zero(0)),
    "stage 1 in 2 rounds": (2, 2, zero(1)),
    "stage 2 recomputing": (2, 1, (*zero(2), "--gradient_checkpointing")),
    "stage 2 alone in 4 rounds": (1, 4, zero(2)),
    "stage 3": (2, 1, zero(3)),
    "stage 3 recomputing in 2 rounds": (2, 2, (*zero(3), "--gradient_checkpointing")),
    "stage 3 alone": (1, 1, zero(3)),
    "offload_optimizer": (2, 1, ("--engine=deepspeed",)),
    "offload_parameters": (2, 1, ("--engine=deepspeed",)),
}


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_losses_do_not_depend_on_the_layout(trainer: Trainer, base: str, optimizer: str, tmp_path: Path) -> None:
    within, own = OPTIMIZERS[optimizer]
    flags = (*FLAGS, base, f"--optimizer={optimizer}", *own)
    assert trainer.run(f"{optimizer} whole", *flags, *cut(1, 1), "--engine=plain").statuses == [0], trainer.said
    wanted = read_losses(trainer.out / f"{optimizer} whole")
    assert len(wanted) == STEPS and max(wanted.values()) > 1.01 * min(wanted.values())
    apart = {}
    for name, (ranks, rounds, extra) in CASES.items():
        if name in OFFLOAD:
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps({"zero_optimization": OFFLOAD[name]}))
            extra = (*extra, f"--deepspeed_config={path}")
        folder = f"{optimizer} {name}"
        outcome = trainer.run(folder, *flags, *cut(ranks, rounds), *extra, ranks=ranks)
        assert set(outcome.statuses) == {0}, (name, trainer.said)
        found = read_losses(trainer.out / folder)
        assert found.keys() == wanted.keys()
        apart[name] = [abs(found[step] / wanted[step] - 1) for step in sorted(wanted)]
        print(f"{optimizer}, {name}: first {apart[name][0]:.1e}, largest {max(apart[name]):.1e}")
    assert {name: values[0] for name, values in apart.items() if values[0] > 1e-5} == {}
    assert {name: max(values) for name, values in apart.items() if max(values) > within} == {}


MOVES = {
    "2 to 1 ranks": ((2, zero(2)), (1, zero(2))),
    "1 to 2 ranks": ((1, zero(1)), (2, zero(1))),
    "plain 2 to 1": ((2, ("--engine=plain",)), (1, ("--engine=plain",))),
    "plain 1 to 2": ((1, ("--engine=plain",)), (2, ("--engine=plain",))),
    "stage 0 to 2": ((2, zero(0)), (2, zero(2))),
    "stage 1 to 3": ((2, zero(1)), (2, zero(3))),
    "stage 3 to 0": ((2, zero(3)), (2, zero(0))),
    "stage 3 on 2 ranks to 1": ((2, zero(3)), (1, zero(3))),
    "stage 2 to 3 on 1 to 2 ranks": ((1, zero(2)), (2, zero(3))),
}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_two_nodes_with_different_numbers_of_ranks(
    trainer: Trainer, engine: str, tmp_path: Path, child_env: dict[str, str]
) -> None:
    """Two launchers on loopback, one with one rank and one with two, against one process."""
    data = (*FLAGS, "--batch_size=1", "--max_steps=4", "--precision=fp32", "--no_eval")
    alone = trainer.run("one node", *data, "--grad_accumulation_steps=3", "--engine=plain")
    assert alone.statuses == [0], trainer.said
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = [*training_flags(trainer.base, trainer.data, tmp_path, "nodes"), *data, "--grad_accumulation_steps=1"]
    nodes = []
    for number, ranks in enumerate((1, 2)):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={number}"]
        command += [f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command += ["train_ds.py", *flags, f"--engine={engine}"]
        nodes.append(subprocess.Popen(command, cwd=ROOT, env=child_env, stderr=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "1 images x 3 ranks x 1 rounds = 3 samples" in said[0]
    assert read_losses(tmp_path / "nodes") == pytest.approx(read_losses(trainer.out / "one node"), rel=1e-3)
    assert read_consumed(tmp_path / "nodes") == list(range(4 * 3))


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_under_another_layout(trainer: Trainer, base: str, optimizer: str) -> None:
    """Four steps, then ten under the other layout, against fourteen without a break."""
    within, own = OPTIMIZERS[optimizer]
    steps, before = 14, 4
    # At a constant rate a run of four steps is the beginning of one of fourteen.
    flags = (*FLAGS, base, f"--optimizer={optimizer}", *own, "--lr_schedule=constant", f"--max_steps={steps}")
    assert trainer.run(f"{optimizer} unbroken", *flags, *cut(1, 1), "--engine=plain").statuses == [0], trainer.said
    wanted = read_losses(trainer.out / f"{optimizer} unbroken")
    starts: dict[tuple[int, tuple[str, ...]], Path] = {}
    apart = {}
    for number, (name, (first, second)) in enumerate(MOVES.items()):
        if first not in starts:
            ranks, extra = first
            folder = f"{optimizer} first {number}"
            outcome = trainer.run(folder, *flags, *cut(ranks, 1), *extra, f"--max_steps={before}", ranks=ranks)
            assert set(outcome.statuses) == {0}, (name, trainer.said)
            starts[first] = trainer.out / folder / "ckpt_model" / f"step{before}"
        ranks, extra = second
        folder = f"{optimizer} second {number}"
        outcome = trainer.run(folder, *flags, *cut(ranks, 1), *extra, f"--resume={starts[first]}", ranks=ranks)
        assert set(outcome.statuses) == {0}, (name, trainer.said)
        found = read_losses(trainer.out / folder)
        assert sorted(found) == list(range(before + 1, steps + 1))
        assert read_consumed(trainer.out / folder) == list(range(before * SAMPLES, steps * SAMPLES))
        apart[name] = max(abs(found[step] / wanted[step] - 1) for step in found)
        print(f"{optimizer}, {name}: largest {apart[name]:.1e}")
    assert {name: value for name, value in apart.items() if value > within} == {}

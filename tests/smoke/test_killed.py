"""Runs that are killed anywhere and started again, against the run that nothing happened to."""

import random
from typing import Any

import pytest
import torch

from tests.smoke.conftest import Trainer
from tests.smoke.killing import Outcome
from utils.engine.checkpoints import latest_tag
from utils.engine.sample_log import read_consumed, read_losses

STEPS, SAMPLES = 6, 4
FLAGS = (f"--max_steps={STEPS}", "--save_every=2", "--lora_dropout=0.1")
DEEPSPEED = (*FLAGS, "--engine=deepspeed")


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoint contents are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (one == other or not isinstance(one, (str, int, float, bool)))


def places(outcome: Outcome, seed: int, number: int) -> list[tuple[int, int]]:
    """Seeded places to kill: every other one while a checkpoint is made, the others anywhere."""
    drawn, found = random.Random(seed), []
    for index in range(number):
        rank = drawn.randrange(len(outcome.events))
        if index % 2:
            found.append((rank, drawn.randrange(1, outcome.events[rank])))
        else:
            first = 2 * drawn.randrange(len(outcome.saves[rank]) // 2)
            found.append((rank, drawn.randrange(*outcome.saves[rank][first : first + 2])))
    return found


def killed_and_resumed(
    trainer: Trainer, name: str, kills: list[tuple[int, int]], ranks: int, *flags: str, steps: int = STEPS
) -> None:
    """Kill the run `name`.N at each place in turn, let it go on to its end, and compare it with the run `name`."""
    straight = trainer.out / name
    for number, kill in enumerate(kills):
        print(f"{name}: kill rank {kill[0]} at event {kill[1]}")
        again = f"{name}.{number}"
        outcome = trainer.run(again, *flags, ranks=ranks, kill=kill)
        print(trainer.said[kill[0]].splitlines()[-1])
        assert outcome.statuses[kill[0]] == -9, trainer.said
        assert outcome.apart < 30 and 0 not in outcome.statuses[: kill[0]] + outcome.statuses[kill[0] + 1 :]
        outcome = trainer.run(again, *flags, ranks=ranks)
        assert set(outcome.statuses) == {0}, trainer.said
        assert read_consumed(trainer.out / again) == list(range(steps * SAMPLES))
        assert read_losses(trainer.out / again) == read_losses(straight)
        tag = latest_tag(straight / "ckpt_model")
        assert tag == latest_tag(trainer.out / again / "ckpt_model") == f"step{steps}"
        files = sorted((straight / "ckpt_model" / tag).glob("*.*"))
        compared = [path for path in files if path.suffix in {".pt", ".bin"}]
        assert len(compared) >= 3
        for path in compared:
            found = [
                torch.load(place / path.name, map_location="cpu", weights_only=False)
                for place in (path.parent, trainer.out / again / "ckpt_model" / tag)
            ]
            assert same(*found), f"{path.name} differs after {kill}"


def test_a_killed_run_ends_as_if_nothing_had_been(trainer: Trainer) -> None:
    straight = trainer.run("plain", *FLAGS, counted=True)
    assert straight.statuses == [0], trainer.said
    assert read_consumed(trainer.out / "plain") == list(range(STEPS * SAMPLES))
    killed_and_resumed(trainer, "plain", places(straight, seed=1, number=2), 1, *FLAGS)


def test_killed_ranks_under_deepspeed_end_as_if_nothing_had_been(trainer: Trainer) -> None:
    """And what they left goes on under another stage in one process."""
    steps = 4
    flags = (*DEEPSPEED, "--lora_dropout=0", f"--max_steps={steps}")
    straight = trainer.run("zero2", *flags, ranks=2, counted=True)
    assert straight.statuses == [0, 0], trainer.said
    assert read_consumed(trainer.out / "zero2") == list(range(steps * SAMPLES))
    killed_and_resumed(trainer, "zero2", places(straight, seed=2, number=1), 2, *flags, steps=steps)
    failing_rank(trainer, straight.events[1] // 2, *flags)
    half_way = trainer.out / "zero2" / "ckpt_model" / "step2"
    reshaped = trainer.run("alone", *flags, "--zero_stage=3", f"--resume={half_way}")
    assert reshaped.statuses == [0], trainer.said
    assert "each process takes its part of the whole" in trainer.said[0]
    wanted, found = read_losses(trainer.out / "zero2"), read_losses(trainer.out / "alone")
    assert found == pytest.approx({step: wanted[step] for step in (3, 4)}, rel=1e-3)


def failing_rank(trainer: Trainer, event: int, *flags: str) -> None:
    """An error on one rank takes the other down without a launcher's help, and its traceback comes first."""
    outcome = trainer.run(f"failing at {event}", *flags, ranks=2, kill=(1, event), fails=True)
    assert outcome.statuses == [2, 1] and outcome.apart < 30, trainer.said
    (said,) = trainer.said
    error, follower = "ArithmeticError: an error at event", "so this one ends too: its own message says why"
    assert -1 < said.find("rank 1 failed:\nTraceback") < said.find(error) < said.find(follower), said


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_killed_in_a_dozen_places(trainer: Trainer) -> None:
    flags = (*FLAGS, "--workers=1", "--deterministic")
    straight = trainer.run("dozen", *flags, counted=True)
    killed_and_resumed(trainer, "dozen", places(straight, seed=3, number=12), 1, *flags)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_killed_in_two_places_under_every_stage(trainer: Trainer, stage: int) -> None:
    flags = (*DEEPSPEED, f"--zero_stage={stage}")
    straight = trainer.run(f"stage{stage}", *flags, ranks=2, counted=True)
    killed_and_resumed(trainer, f"stage{stage}", places(straight, seed=10 + stage, number=2), 2, *flags)
    failing_rank(trainer, straight.events[1] * stage // 4, *flags)

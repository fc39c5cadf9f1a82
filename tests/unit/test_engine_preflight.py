"""What is said and refused before the first step: batches, memory, rows of tokens, locks that killed builds left."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.engine_toys import make_toy
from utils.cli.commands import parse_train
from utils.cli.errors import UserError
from utils.engine.preflight import (
    available_memory,
    batch_arithmetic,
    describe_draws,
    require_rows,
    required_memory,
    warn_below_chance,
)
from utils.engine.runtime import remove_stale_locks


def test_the_arithmetic_of_a_step() -> None:
    flags = ["--version=v", "--batch_size=2", "--grad_accumulation_steps=10", "--epochs=10", "--steps_per_epoch=500"]
    args = parse_train(flags)
    # 2 x 8 x 10 = 160; 10 x 500 steps of 160 are 800,000.
    assert batch_arithmetic(args.optimizer, 8) == (
        "a step is 2 images x 8 ranks x 10 rounds = 160 samples; 5,000 steps take 800,000"
    )
    assert describe_draws(["a", "b"], [0.75, 0.25], [600, 100], 400).splitlines() == [
        "a: about 300 samples, 0.5 times its 600 images",
        "b: about 100 samples, 1.0 times its 100 images",
    ]


def test_memory_by_hand() -> None:
    model = nn.Sequential(
        nn.Linear(100, 10, bias=False).bfloat16().requires_grad_(False), nn.Linear(10, 20, bias=False)
    )
    # 1,000 frozen numbers of 2 bytes and 200 of 4 that train: 2,800; gradients 800; moments 1,600, from stage 1 on with
    # another copy of 800 bytes.
    assert required_memory(model, 0, 4) == 2800 + 800 + 1600
    assert required_memory(model, 1, 4) == 2800 + 800 + 2400 // 4
    assert required_memory(model, 2, 4) == 2800 + 800 // 4 + 2400 // 4
    assert required_memory(model, 3, 4) == (2800 + 800 + 2400) // 4
    whole, half = (available_memory(torch.device("cpu"), ranks) for ranks in (1, 2))
    assert whole is not None and half is not None and half == pytest.approx(whole / 2, rel=0.2)


def test_tokens_without_rows_are_refused() -> None:
    require_rows(300, 300, 304)
    with pytest.raises(UserError, match="has 300 tokens, but the lm_head only 296 rows"):
        require_rows(300, 300, 296)


def test_a_score_below_chance_says_what_to_look_at() -> None:
    assert warn_below_chance(0.3) is None
    assert "do masks lie on their images" in str(warn_below_chance(0.01))


def test_flags_that_contradict(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_train(["--version=v", "--resume=a", "--weight=b"])
    assert "--resume and --weight both say" in capsys.readouterr().err


def test_the_lock_of_a_killed_build_is_removed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    old, new = (tmp_path / "py311_cpu" / f"deepspeed_{name}" / "lock" for name in ("old", "new"))
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (1, 1))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    remove_stale_locks()
    assert not old.exists() and new.exists(), "somebody may be building"
    assert f"removed {old}" in capsys.readouterr().err


def test_the_toy_needs_what_it_needs() -> None:
    """Buffers apart, the estimate of a model with frozen parts is that of its numbers."""
    toy = make_toy()
    frozen = sum(p.numel() for p in toy.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in toy.parameters() if p.requires_grad)
    assert required_memory(toy, 0, 1) == 4 * frozen + (4 + 4 + 8) * trained

"""What is said and refused before the first step: batches, memory, rows of tokens, locks that killed runs left."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.engine_toys import make_toy
from utils.cli.commands import parse_train
from utils.cli.errors import UserError
from utils.engine.preflight import batch_arithmetic, draws, memory_needed, memory_there, require_rows, under_chance
from utils.engine.stale_locks import clear_stale_locks


def test_the_arithmetic_of_a_step() -> None:
    flags = ["--version=v", "--batch_size=2", "--grad_accumulation_steps=10", "--epochs=10", "--steps_per_epoch=500"]
    args = parse_train(flags)
    # 2 x 8 x 10 = 160; 10 x 500 steps of 160 are 800,000.
    assert batch_arithmetic(args.optimizer, 8) == (
        "a step is 2 images x 8 ranks x 10 rounds = 160 samples; 5,000 steps take 800,000"
    )
    assert draws(["a", "b"], [0.75, 0.25], [600, 100], 400).splitlines() == [
        "a: about 300 samples, 0.5 times its 600 images",
        "b: about 100 samples, 1.0 times its 100 images",
    ]


def test_memory_by_hand() -> None:
    model = nn.Sequential(
        nn.Linear(100, 10, bias=False).bfloat16().requires_grad_(False), nn.Linear(10, 20, bias=False)
    )
    # 1,000 frozen numbers of 2 bytes and 200 of 4 that train: 2,800; gradients 800; moments 1,600, from stage 1 on with
    # another copy of 800 bytes.
    assert memory_needed(model, 0, 4) == 2800 + 800 + 1600
    assert memory_needed(model, 1, 4) == 2800 + 800 + 2400 // 4
    assert memory_needed(model, 2, 4) == 2800 + 800 // 4 + 2400 // 4
    assert memory_needed(model, 3, 4) == (2800 + 800 + 2400) // 4
    whole, half = (memory_there(torch.device("cpu"), ranks) for ranks in (1, 2))
    assert whole is not None and half is not None and half == pytest.approx(whole / 2, rel=0.2)


def test_tokens_without_rows_are_refused() -> None:
    require_rows(300, 300, 304)
    with pytest.raises(UserError, match="has 300 tokens, but the lm_head only 296 rows"):
        require_rows(300, 300, 296)


def test_a_score_below_chance_says_what_to_look_at() -> None:
    assert under_chance(0.3) is None
    assert "do masks lie on their images" in str(under_chance(0.01))


def test_flags_that_contradict(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_train(["--version=v", "--resume=a", "--weight=b"])
    assert "--resume and --weight both say" in capsys.readouterr().err


def locked(root: Path) -> Path:
    lock = root / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_a_lock_that_nobody_holds_is_removed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lock = locked(tmp_path)
    with lock.open():
        clear_stale_locks(first=True, root=tmp_path)
        assert lock.exists(), "this process has it open"
    clear_stale_locks(first=True, root=tmp_path)
    assert not lock.exists() and f"removed {lock}" in capsys.readouterr().err
    clear_stale_locks(first=True, root=tmp_path)


def test_other_ranks_wait_for_the_first(tmp_path: Path) -> None:
    lock = locked(tmp_path)
    with pytest.raises(UserError, match=r"lock was left by a run that was killed.*remove it"):
        clear_stale_locks(first=False, root=tmp_path, patience=0.1)
    looks = iter([False, False, True])

    def taken_meanwhile(path: Path) -> bool:
        return next(looks)

    clear_stale_locks(first=False, root=tmp_path, is_held=taken_meanwhile)
    assert lock.exists()


def test_a_lock_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = locked(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=rf"{lock} was left .* \(Permission denied\): remove it by hand"):
        clear_stale_locks(first=True, root=tmp_path)


def test_the_toy_needs_what_it_needs() -> None:
    """Buffers apart, the estimate of a model with frozen parts is that of its numbers."""
    toy = make_toy()
    frozen = sum(p.numel() for p in toy.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in toy.parameters() if p.requires_grad)
    assert memory_needed(toy, 0, 1) == 4 * frozen + (4 + 4 + 8) * trained

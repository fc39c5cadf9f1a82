"""Shared rows: every state, loss and gradient is that of rows of their own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.build.tiny import TinyShape, make_tiny
from model.modeling_pixellm import PixelLMForCausalLM
from model.prefix_sharing import share_prefixes
from tests.unit.engine_real import write_real
from tests.unit.sharing_ranks import step_of
from utils.engine.runtime import Runtime

SHAPE = TinyShape(image_size=32, vision_width=16, vision_layers=4, width=32, layers=2, mlp_width=48, embedding_dim=32)


def test_a_plan_by_hand() -> None:
    """Two conversations that share 7 8 9; of the picture's positions the second is padding."""
    ids = torch.tensor([[7, 8, 9, 1, 2], [7, 8, 9, 3, 0], [5, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    plan = share_prefixes(ids, mask, torch.tensor([0, 0, 3]))
    assert plan is not None
    assert ids[plan.rows, plan.columns][0].tolist() == [7, 8, 9, 1, 2, 3]
    assert plan.positions[0].tolist() == [0, 1, 2, 3, 4, 3]
    assert plan.allowed[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]
    assert plan.home_columns[1].tolist() == [0, 1, 2, 5, 5]
    assert plan.home_rows.flatten().tolist() == [0, 0, 1]


def test_one_conversation_each_shares_nothing() -> None:
    assert share_prefixes(torch.ones(2, 3), torch.ones(2, 3).bool(), torch.tensor([0, 1])) is None


def _batch(model: PixelLMForCausalLM, processor: object) -> dict[str, object]:
    turns = [
        [("the red circle", "Sure, the red circle {seg}.")],
        [("the red square and more", "Here: the red square {seg} and the star {seg}."), ("and now?", "Nothing.")],
        [("what is there?", "Nothing at all is to be seen there, as far as one can tell.")],
    ]
    encoded = [processor.encode_conversation(one) for one in turns]  # type: ignore[attr-defined]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [one.input_ids for one in encoded]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True).bool(),
        "labels": pad([one.labels for one in encoded], batch_first=True, padding_value=-100),
        "pixel_values": {"vision_tower": torch.randn(2, 3, 32, 32)},
        "resized_sizes": torch.tensor([[16, 32], [32, 32]]),
        "original_sizes": torch.tensor([[20, 40], [8, 8]]),
        "image_index": torch.tensor([0, 0, 1]),
        "masks": [torch.randint(0, 2, (3, 20, 40), dtype=torch.uint8), torch.zeros(0, 8, 8, dtype=torch.uint8)],
        "target_questions": torch.tensor([0, 1, 1]),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_equal_those_of_separate_rows(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = make_tiny(["the red circle and the blue square"], SHAPE, seed=0)
    model = built.model.train()
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    batch = _batch(model, built.processor)

    def run() -> tuple[dict[str, float], torch.Tensor]:
        model.zero_grad()
        losses = model(**batch).losses
        torch.stack([term.sum for term in losses.values()]).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return {name: term.sum.item() for name, term in losses.items()}, torch.cat(gradients)

    assert model.shares_prefixes
    together, gradient_together = run()
    monkeypatch.setattr(PixelLMForCausalLM, "shares_prefixes", False)
    apart, gradient_apart = run()
    assert together == pytest.approx(apart, rel=1e-5)
    assert (gradient_together - gradient_apart).norm() <= 1e-4 * gradient_apart.norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("real")
    write_real(place)
    return place


def assert_alike(together: Any, apart: Any) -> None:
    """(losses, gradients, number of shared rows) of two ways."""
    losses, gradient, shared = together
    assert shared > 0, "the step holds no two conversations about one picture"
    assert losses == pytest.approx(apart[0], rel=1e-5)
    assert (gradient - apart[1]).norm() <= 1e-3 * apart[1].norm()


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_steps_of_true_data_in_rounds_equal_separate_rows(folder: Path, rounds: int) -> None:
    """Uneven conversations about drawn scenes, accumulated over micro-batches."""
    alone = Runtime("plain", 0, 0, 1, torch.device("cpu"))
    assert_alike(*(step_of(folder, alone, sharing, rounds) for sharing in (True, False)))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_ranks_equal_separate_rows(folder: Path, repository: Path, child_env: dict[str, str]) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*start, "-m", "tests.unit.sharing_ranks", str(folder)]
    done = subprocess.run(command, cwd=repository, env=child_env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(folder / "sharing.pt")
    assert_alike(found[True], found[False])
    # Two ranks of two rounds have the pictures of four rounds of one.
    alone = step_of(folder, Runtime("plain", 0, 0, 1, torch.device("cpu")), False, 4)
    assert_alike(found[True], alone)


@pytest.mark.parametrize(
    ("attention", "settings"),
    [("flash_attention_2", {}), ("flex_attention", {}), ("sdpa", {"sliding_window": 12})],
)
def test_attention_that_takes_no_mask_of_ours_gets_rows_of_their_own(
    attention: str, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = make_tiny(["the red circle and the blue square"], SHAPE, seed=0)
    text = built.model.config.text_config
    assert built.model.shares_prefixes
    monkeypatch.setattr(text, "_attn_implementation_internal", attention)
    for name, value in settings.items():
        monkeypatch.setattr(text, name, value, raising=False)
    assert not built.model.shares_prefixes


def test_two_conversations_fit_one_row_only_with_one_beginning() -> None:
    """What differs from the first token on is not shared, but still goes into one row."""
    plan = share_prefixes(torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2).bool(), torch.tensor([0, 0]))
    assert plan is not None
    assert plan.positions[0].tolist() == [0, 1, 0, 1]
    assert plan.allowed[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]

"""Shared rows: every state, loss and gradient is that of rows of their own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from demo.tiny import TinyShape, make_tiny
from model.modeling_pixellm import PixelLMForCausalLM
from model.prefix_sharing import SharedPrefix, pack_sequences
from tests.unit.engine_real import write_real
from tests.unit.sharing_ranks import step_of
from utils.engine.runtime import Runtime

SHAPE = TinyShape(image_size=32, vision_width=16, vision_layers=4, width=32, layers=2, mlp_width=48, embedding_dim=32)


def test_a_plan_by_hand() -> None:
    """Two conversations that share 7 8 9, and a third one about another image; of the first image's positions the
    second is padding."""
    ids = torch.tensor([[7, 8, 9, 1, 2], [7, 8, 9, 3, 0], [5, 6, 0, 0, 0]])
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    plan = pack_sequences(ids, mask, torch.tensor([0, 0, 3]))
    assert ids[plan.sequences, plan.columns].tolist() == [7, 9, 1, 2, 3, 5, 6]
    assert plan.columns.tolist() == [0, 2, 3, 4, 3, 0, 1]
    assert plan.prefixes == (SharedPrefix(2, (2, 1)), SharedPrefix(2, ()))
    assert plan.attention_mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    home = plan.state_index.masked_fill(~mask, -1)
    assert home.tolist() == [[0, -1, 1, 2, 3], [0, -1, 1, 4, -1], [5, 6, -1, -1, -1]]


def test_equal_conversations_are_one_and_unequal_ones_share_nothing() -> None:
    twice = torch.tensor([[1, 2, 3], [1, 2, 3]])
    everywhere = torch.ones_like(twice).bool()
    plan = pack_sequences(twice, everywhere, torch.tensor([0, 0]))
    assert plan.prefixes == (SharedPrefix(3, ()),) and plan.state_index.tolist() == [[0, 1, 2], [0, 1, 2]]
    apart = pack_sequences(torch.tensor([[1, 2, 3], [4, 2, 3]]), everywhere, torch.tensor([0, 0]))
    assert apart.prefixes == (SharedPrefix(0, (3, 3)),) and apart.state_index.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("heads_of_keys", [4, 2])
def test_attention_in_blocks_is_attention_under_the_dense_mask(heads_of_keys: int) -> None:
    """Values and gradients, with as many and with fewer heads of keys."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (6, 12), generator=generator)
    ids[:, 0] = torch.tensor([0, 0, 0, 1, 1, 2])
    mask = torch.arange(12)[None] < torch.tensor([12, 9, 3, 7, 1, 5])[:, None]
    plan = pack_sequences(ids, mask, torch.tensor([0, 0, 0, 1, 1, 2]))
    length = len(plan.sequences)
    shapes = [(1, heads, length, 8) for heads in (4, heads_of_keys, heads_of_keys)]
    states = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)

    def run(given: torch.Tensor) -> list[torch.Tensor]:
        found = F.scaled_dot_product_attention(*states, attn_mask=given, enable_gqa=heads_of_keys != 4)
        return [found, *torch.autograd.grad((found * weights).sum(), states)]

    for block, dense in zip(run(plan.make_mask("sdpa", torch.float32)), run(plan.attention_mask()), strict=True):
        torch.testing.assert_close(block, dense)


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
    assert shared > 0, "the step holds no two conversations about one image"
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
    # Two ranks of two rounds have the images of four rounds of one.
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

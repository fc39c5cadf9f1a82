"""What trains, LoRA in and out again, and embeddings that are tied to the head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_batches import NONE, ONE, TWO, make_batch, total_loss
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import (
    BuildError,
    BuiltModel,
    TrainingRecipe,
    build_model,
    choose_trainable,
    merge_lora,
    save_model,
)

LAYERS = 2
TABLES = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
NO_LOSS = ("pixel_decoder.iou_head.", *(f"pixel_decoder.hypernetworks.{number}." for number in (1, 2, 3)))


def batch_for(built: BuiltModel) -> dict[str, Any]:
    return make_batch(built.processor, [(0, ONE), (0, TWO), (1, NONE)], [(20, 40), (24, 24)])


def names(built: BuiltModel, *prefixes: str) -> set[str]:
    return {name for name, _ in built.model.named_parameters() if name.startswith(prefixes)}


def lora(*leaves: str) -> set[str]:
    """Names of the two matrices of every adapter, in every layer."""
    return {
        f"language_model.model.layers.{layer}.{leaf}.lora_{matrix}.default.weight"
        for layer in range(LAYERS)
        for leaf in leaves
        for matrix in "AB"
    }


def test_the_papers_recipe_trains_what_it_lists() -> None:
    """Head, embeddings, both projectors, codebook, fusion weights, neck, no-mask embedding, decoder, and LoRA; of the
    decoder not what no loss reaches."""
    built = make_model()
    trained = choose_trainable(built.model, TrainingRecipe())
    assert len(trained) == len(set(trained))
    parts = names(built, "projector.", "mask_projector.", "codebook.", "pixel_decoder.")
    without_loss = names(built, *NO_LOSS)
    assert len(without_loss) == 4 * 3 * 2, "three layers of weight and bias each"
    assert set(trained) == TABLES | lora("self_attn.q_proj", "self_attn.v_proj") | parts - without_loss
    listed = ["codebook.token_weights", "pixel_decoder.scale_weights", "pixel_decoder.no_mask_embed.weight"]
    listed += ["pixel_decoder.neck.0.weight", "codebook.layers.0.weight", "codebook.layers.2.weight"]
    assert set(listed) <= set(trained)
    assert {name for name, p in built.model.named_parameters() if p.requires_grad} == set(trained)


def test_the_projector_may_stay_as_it_is() -> None:
    built = make_model()
    everything = choose_trainable(built.model, TrainingRecipe(lora_r=0))
    trained = choose_trainable(built.model, TrainingRecipe(lora_r=0, train_projector=False))
    assert set(everything) - set(trained) == names(built, "projector.") != set()


RECIPES = [
    TrainingRecipe(lora_dropout=0),
    TrainingRecipe(lora_dropout=0, lora_target_modules="all-linear", train_vision_tower=True),
    TrainingRecipe(train_language_model=True),
    TrainingRecipe(train_mask_decoder=False, lora_r=0),
]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("recipe", RECIPES, ids=["paper", "all", "language model", "words"])
def test_a_loss_reaches_all_that_trains(tower: str, recipe: TrainingRecipe, tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", "llama")
    built = build_model(str(base), str(write_tower(tmp_path / "tower", tower)), options())
    trained = choose_trainable(built.model, recipe)
    model = built.model.train()
    losses = model(**batch_for(built)).losses
    if not recipe.train_mask_decoder:
        losses = {"ce": losses["ce"]}
    total_loss(model, losses).backward()
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert parameter.grad is None, f"{name} is frozen and got a gradient"
            continue
        assert parameter.grad is not None, f"{name} trains and got no gradient"
        # While B is 0, A has a gradient of exact zeros; a bias on keys shifts all scores of a query alike.
        if "lora_A" not in name and not name.endswith("k_proj.bias"):
            assert bool(parameter.grad.any()), f"{name} trains and got zeros"


def test_other_recipes() -> None:
    everything = make_model()
    trained = set(choose_trainable(everything.model, TrainingRecipe(train_language_model=True, lora_r=8)))
    assert names(everything, "language_model.") <= trained and not any("lora" in name for name in trained)

    words = make_model()
    trained = set(choose_trainable(words.model, TrainingRecipe(train_mask_decoder=False)))
    assert trained == TABLES | names(words, "projector.") | lora("self_attn.q_proj", "self_attn.v_proj")

    seeing = make_model()
    trained = set(choose_trainable(seeing.model, TrainingRecipe(train_vision_tower=True)))
    # Hidden states -2 and -4 of four layers are read: after the third, nothing is.
    unread = names(seeing, "vision_tower.model.encoder.layers.3.", "vision_tower.model.post_layernorm.")
    assert unread and trained & names(seeing, "vision_tower.") == names(seeing, "vision_tower.") - unread

    linear = make_model()
    trained = set(choose_trainable(linear.model, TrainingRecipe(lora_target_modules="all-linear", lora_r=2)))
    leaves = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert {name for name in trained if "lora" in name} == lora(*leaves)

    spaced = make_model()
    trained = set(choose_trainable(spaced.model, TrainingRecipe(lora_target_modules=" o_proj , up_proj,")))
    assert {name for name in trained if "lora" in name} == lora("self_attn.o_proj", "mlp.up_proj")


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ("q_prj,v_proj", "names q_prj: expected some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("", "names nothing"),
        (" , ", "names nothing"),
        ("lm_head", "names lm_head"),
        ("all-linear,q_proj", "names all-linear"),
    ],
)
def test_bad_lora_targets_are_named(modules: str, said: str) -> None:
    with pytest.raises(BuildError, match=f"--lora_target_modules {said}"):
        choose_trainable(make_model().model, TrainingRecipe(lora_target_modules=modules))


def logits(built: BuiltModel, batch: dict[str, Any]) -> torch.Tensor:
    """All logits of text and masks in one row."""
    with torch.no_grad():
        output = built.model.eval()(**batch)
    text = built.model.get_output_embeddings()(output.last_hidden_state)[output.attention_mask]
    return torch.cat([text.flatten(), *(masks.flatten() for masks in output.mask_logits)])


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_merges_and_comes_back(tied: bool, tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", "qwen2", tie_word_embeddings=tied)
    built = build_model(str(base), str(write_tower(tmp_path / "tower", "clip")), options())
    before = [name for name, _ in built.model.named_parameters()]
    batch, model = batch_for(built), built.model
    untrained = logits(built, batch)
    trained = choose_trainable(model, TrainingRecipe(lora_r=2, lora_dropout=0.1))
    assert len(TABLES & set(trained)) == (1 if tied else 2)
    assert torch.allclose(logits(built, batch), untrained, atol=1e-6), "an adapter that has not trained does nothing"
    adapters = [name for name in trained if "lora_B" in name]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        total_loss(model, model(**batch).losses).backward()
        optimizer.step()
    assert all(bool(model.get_parameter(name).any()) for name in adapters)
    learned = logits(built, batch)
    scale = learned.abs().max()
    assert (learned - untrained).abs().max() > 1e-2 * scale

    assert merge_lora(model) == 2 * LAYERS
    assert [name for name, _ in model.named_parameters()] == before
    merged = logits(built, batch)
    assert (merged - learned).abs().max() <= 1e-5 * scale
    assert merge_lora(model) == 0
    assert torch.equal(logits(built, batch), merged)

    save_model(model, built.processor, tmp_path / "saved")
    again = build_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for reloaded in (again.model, loaded):
        assert torch.equal(logits(BuiltModel(reloaded, built.processor, again.report), batch), merged)
        _check_tie(reloaded, tied)
    assert choose_trainable(again.model, TrainingRecipe(lora_r=4)), "it can be trained further"


def _check_tie(model: Any, tied: bool) -> None:
    """One table for both, or two: also when one of them changes."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (table is head) == tied
    old = head[0, 0].item()
    with torch.no_grad():
        table[0, 0] += 1
        assert (head[0, 0].item() != old) == tied
        table[0, 0] -= 1

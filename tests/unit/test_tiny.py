"""The tiny model made from nothing: its tokenizer and where it starts."""

from dataclasses import replace
from pathlib import Path

import torch

from demo.tiny import embeddings_of, make_tiny, train_tokenizer
from tests.unit.tiny_batches import NONE, ONE, make_batch, total_loss
from tests.unit.tiny_pixellm import SHAPE, make_model
from utils.checkpoints.builder import MASK_PARTS, TrainingRecipe, build_model, choose_trainable, save_model

TEXTS = ["nothing red blue circle square e2 in the e2 and d4"] * 3


def test_a_seed_fixes_every_weight() -> None:
    first, again, other = (make_tiny(TEXTS, SHAPE, seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_tokenizer_knows_frequent_words_and_spells_the_rest() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    for word in ("red", "circle", "e2"):
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
    for text in ("the red circle", "żółć and 猫!", "a\nb  c"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_heads_of_a_tower_start_looking_at_neighbours() -> None:
    """On a grey image, where nothing but place tells patches apart: left, right, above, below."""
    shape = replace(SHAPE, image_size=112, patch_size=16, vision_width=128, num_heads=4)
    tower = make_tiny(TEXTS, shape, seed=0).model.vision_tower.model
    states = tower.pre_layrnorm(tower.embeddings(torch.zeros(1, 3, 112, 112)))
    layer = tower.encoder.layers[0]
    attention, normed = layer.self_attn, layer.layer_norm1(states)
    query, key = (p(normed).view(50, 4, 32).transpose(0, 1) for p in (attention.q_proj, attention.k_proj))
    looks = (query @ key.transpose(1, 2))[:, 1 + 24, 1:]  # from the patch in row 3, column 3 of 7
    assert [divmod(int(place), 7) for place in looks.argmax(1)] == [(3, 2), (3, 4), (2, 3), (4, 3)]


def test_heads_of_the_language_model_start_looking_back() -> None:
    """Whatever the words are: one, two and three back, from the last of eight."""
    shape = replace(SHAPE, width=128, text_num_heads=4, text_head_dim=32, vocab_size=400)
    built = make_tiny(TEXTS, shape, seed=0)
    decoder = built.model.language_model.get_decoder()
    decoder.config._attn_implementation = "eager"
    words = built.processor.tokenizer.encode(" red in the e2 and blue d4 circle", add_special_tokens=False)[-8:]
    with torch.no_grad():
        looks = decoder(input_ids=torch.tensor([words]), output_attentions=True).attentions[0][0, :3, -1]
    assert looks.argmax(dim=1).tolist() == [6, 5, 4] and bool((looks.amax(dim=1) > 0.5).all())


def test_every_head_that_looks_back_finds_names() -> None:
    """A name keeps its length in what a head takes of it, at every distance; heads that are free take another part."""
    shape = replace(SHAPE, width=128, text_num_heads=8, text_head_dim=32, vocab_size=400)
    built = make_tiny(TEXTS, shape, seed=0, names=("red", "blue", "circle"))
    (names,) = embeddings_of(built, [("red", "blue", "circle")])
    value = built.model.language_model.get_decoder().layers[0].self_attn.v_proj.weight
    taken = (names @ value.T).view(3, 8, 32).norm(dim=-1).detach() / names.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(taken[:, :4], torch.ones(3, 4), atol=1e-4, rtol=0)
    assert bool(((taken[:, 4:] - 1).abs() > 0.01).all())


def test_a_base_of_words_lacks_mask_parts_and_gets_new_ones(tmp_path: Path) -> None:
    base = make_model()
    save_model(base.model, base.processor, tmp_path / "base", left_out=MASK_PARTS)
    built = build_model(str(tmp_path / "base"))
    assert {name.split(".")[0] for name in built.report.newly_initialized} == set(MASK_PARTS)
    assert {name.split(".")[0] for name in built.report.loaded} == {"language_model", "vision_tower", "projector"}
    table = built.report.table()
    assert all(f"new      {part} (" in table for part in MASK_PARTS), table
    own, kept = built.model.state_dict(), base.model.state_dict()
    assert all(torch.equal(own[name], kept[name]) for name in built.report.loaded)

    choose_trainable(built.model, TrainingRecipe())
    batch = make_batch(built.processor, [(0, ONE), (1, NONE)], [(20, 40), (24, 24)])
    losses = built.model.train()(**batch).losses
    total_loss(built.model, losses).backward()
    assert all(bool(p.isfinite().all()) for p in built.model.parameters())

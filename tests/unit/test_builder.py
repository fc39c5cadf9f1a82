"""From plain folders to a PixelLM and on from one: every kind of base, what it carries along, and larger images."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model.processing_pixellm import check_groups
from model.vision_tower import resize_position_table
from tests.unit.tiny_bases import PATCH, SIDE, options, write_language_model, write_tower
from tests.unit.tiny_batches import NONE, ONE, TWO, make_batch
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import MASK_PARTS, BuiltModel, ModelOptions, build_model, load_weights_into, save_model

# Language model, its tokenizer, conversation format, tower, and whether embeddings and head are one table.
BASES = [
    ("llama", "fast_llama", "llava_v1", "clip", False),
    ("mistral", "byte_bpe", "llava_llama_2", "siglip", False),
    ("qwen2", "byte_bpe", "chat_template", "clip_whole", True),
    ("qwen3", "byte_bpe", "chat_template", "siglip_whole", True),
]
TABLE = "vision_tower.model.embeddings.position_embedding.weight"


def batch_for(built: BuiltModel) -> dict:
    return make_batch(built.processor, [(0, ONE), (0, TWO), (1, NONE)], [(20, 40), (24, 24)])


def outputs(built: BuiltModel, batch: dict) -> list[torch.Tensor]:
    """The logits of text and masks."""
    with torch.no_grad():
        output = built.model(**batch)
    logits = built.model.get_output_embeddings()(output.last_hidden_state)
    return [logits[output.attention_mask], *output.mask_logits]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("kind", "tokenizer", "conversation", "tower", "tied"), BASES, ids=[base[0] for base in BASES])
def test_plain_folders_become_a_pixellm_that_goes_on(
    kind: str, tokenizer: str, conversation: str, tower: str, tied: bool, tmp_path: Path
) -> None:
    base = write_language_model(tmp_path / "base", kind, tokenizer, tie_word_embeddings=tied)
    eye = write_tower(tmp_path / "tower", tower)
    built = build_model(str(base), str(eye), options(conversation))
    check_groups(built.processor)
    _carries(built, base, eye)
    fresh = {name.split(".")[0] for name in built.report.newly_initialized}
    assert fresh == {"projector", "mask_projector", "codebook", "pixel_decoder", "language_model"}
    assert ("text_model" in built.report.table()) == ("whole" in tower), "what is not the tower is named as ignored"

    batch = batch_for(built)
    losses = built.model(**batch).losses
    assert set(losses) == {"ce", "bce", "dice"}
    assert all(torch.isfinite(term.sum) and term.sum > 0 for term in losses.values())

    save_model(built.model, built.processor, tmp_path / "saved")
    again = build_model(str(tmp_path / "saved"))
    assert not again.report.newly_initialized and not again.report.ignored
    assert again.processor.settings() == built.processor.settings()
    assert torch.equal(batch_for(again)["input_ids"], batch["input_ids"])
    assert same(outputs(built, batch), outputs(again, batch))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert same(outputs(built, batch), outputs(BuiltModel(loaded, again.processor, again.report), batch))
    for model in (built.model, again.model, loaded):
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def _carries(built: BuiltModel, base: Path, eye: Path) -> None:
    """Every weight of the folders is in the model as it was, the rows of added tokens apart."""
    own = built.model.state_dict()
    for name, value in load_file(base / "model.safetensors").items():
        assert torch.equal(own[f"language_model.{name}"][: len(value)], value), name
    stored = load_file(eye / "model.safetensors")
    tower = {name.removeprefix("vision_model."): value for name, value in stored.items()}
    for name, value in built.model.vision_tower.model.state_dict().items():
        assert torch.equal(tower[name], value), name


def test_added_tokens_begin_like_the_others(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", "llama")
    built = build_model(str(base), str(write_tower(tmp_path / "tower", "clip")), options())
    table = built.model.get_input_embeddings().weight
    old = len(load_file(base / "model.safetensors")["model.embed_tokens.weight"])
    assert len(table) == len(built.processor.tokenizer) > old
    # At the mean of the others, up to a little noise: far closer to it than they are themselves.
    mean = table[:old].mean(0)
    assert (table[old:] - mean).std() < 0.1 * (table[:old] - mean).std()


def test_spare_rows_of_a_table_are_used_first(tmp_path: Path) -> None:
    """Qwen's tables have more rows than its tokenizer has tokens."""
    base = write_language_model(tmp_path / "base", "qwen2", vocab_size=512)
    built = build_model(str(base), str(write_tower(tmp_path / "tower", "clip")), options())
    assert built.model.get_input_embeddings().num_embeddings == 512
    assert max(built.processor.seg_token_ids) < 512
    assert "language_model.embeddings" not in built.report.newly_initialized


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_larger_images_keep_what_the_tower_knows_of_places(tower: str, tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", "llama")
    eye = write_tower(tmp_path / "tower", tower)
    native = build_model(str(base), str(eye), options())
    save_model(native.model, native.processor, tmp_path / "saved")
    table = native.model.state_dict()[TABLE]
    class_rows = table.shape[0] - (SIDE // PATCH) ** 2
    assert class_rows == native.model.vision_tower.num_class_tokens == {"clip": 1, "siglip": 0}[tower]
    expected = resize_position_table(table, 2 * SIDE // PATCH, class_rows, "standard")
    new = build_model(str(base), str(eye), options(image_size=2 * SIDE))
    continued = build_model(str(tmp_path / "saved"), options=ModelOptions(image_size=2 * SIDE))
    for built in (new, continued):
        assert built.model.config.image_size == built.processor.image_size == 2 * SIDE
        assert torch.equal(built.model.state_dict()[TABLE], expected)
        losses = built.model(**batch_for(built)).losses
        assert all(torch.isfinite(term.sum) for term in losses.values())
    rest = {name: value for name, value in native.model.state_dict().items() if name != TABLE}
    assert all(torch.equal(continued.model.state_dict()[name], value) for name, value in rest.items())


def test_a_resized_table_keeps_its_class_row_and_its_slope() -> None:
    """On a 4 x 4 grid that rises from left to right, the 8 x 8 one rises from left to right too."""
    columns = torch.arange(4.0).repeat(4)[:, None]
    table = torch.cat([torch.tensor([[99.0]]), columns])
    resized = resize_position_table(table, 8, 1, "standard")
    assert resized.shape == (65, 1) and resized[0] == 99
    grid = resized[1:].view(8, 8)
    assert torch.allclose(grid, grid[:1].expand(8, 8), atol=1e-6)
    assert bool((grid[0].diff() > 0).all()) and grid.mean() == pytest.approx(1.5, abs=1e-6)
    with pytest.raises(ValueError, match="a position table of 18 rows is not 1 class row"):
        resize_position_table(torch.zeros(18, 1), 8, 1, "standard")


def test_options_change_what_has_no_weights(tmp_path: Path) -> None:
    built = make_model()
    save_model(built.model, built.processor, tmp_path / "saved")
    changed = ModelOptions(
        refinement_alpha=1.0, conversation_format="llava_v1", model_max_length=100, image_token_pool=2
    )
    again = build_model(str(tmp_path / "saved"), options=changed)
    assert again.model.config.refinement_alpha == 1 and again.model.config.image_token_pool == 2
    assert again.processor.conversation_format == "llava_v1" and again.processor.model_max_length == 100
    assert again.processor.num_image_tokens == again.model.config.num_image_tokens == 4
    assert again.model.config.token_fusion_value == built.model.config.token_fusion_value


def test_a_caller_may_load_the_weights_itself(tmp_path: Path) -> None:
    built = make_model()
    save_model(built.model, built.processor, tmp_path / "saved")
    empty = build_model(str(tmp_path / "saved"), load_weights=False)
    assert not empty.report.loaded
    load_weights_into(empty.model, built.model.state_dict(), "a state dict")
    batch = batch_for(built)
    assert same(outputs(built, batch), outputs(empty, batch))


@pytest.mark.parametrize(("scales", "tokens"), [(1, 3), (3, 1), (3, 3)])
def test_scales_and_tokens_are_chosen_with_the_first_mask_parts(scales: int, tokens: int, tmp_path: Path) -> None:
    """For a plain base, and for one that learned words with 2 scales x 3 tokens and has no mask parts yet."""
    base = write_language_model(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    eye = write_tower(tmp_path / "tower", "clip")
    new = build_model(str(base), str(eye), options(num_scales=scales, tokens_per_scale=tokens))
    words = build_model(str(base), str(eye), options())
    save_model(words.model, words.processor, tmp_path / "words", left_out=MASK_PARTS)
    layers = [-2, -3, -4][:scales]
    chosen = ModelOptions(num_scales=scales, tokens_per_scale=tokens, vision_feature_layers=layers)
    continued = build_model(str(tmp_path / "words"), options=chosen)
    for built in (new, continued):
        assert built.model.config.seg_token_ids == built.processor.seg_token_ids
        assert len(built.processor.seg_token_ids) == scales * tokens
        assert built.model.config.token_fusion_value == pytest.approx(1 / tokens)
        assert built.model.get_input_embeddings().num_embeddings >= len(built.processor.tokenizer)
        assert built.model.get_input_embeddings().weight is built.model.get_output_embeddings().weight
        output = built.model(**batch_for(built))
        assert output.embeddings.shape[1] == scales and torch.isfinite(output.losses["bce"].sum)
    old = words.model.get_input_embeddings().weight
    assert torch.equal(continued.model.get_input_embeddings().weight[: len(old)], old)
    assert ("language_model.embeddings" in continued.report.newly_initialized) == (scales * tokens > 6)


def test_a_tower_beside_a_pixellm_is_said_to_be_ignored(tmp_path: Path) -> None:
    built = make_model()
    save_model(built.model, built.processor, tmp_path / "saved")
    again = build_model(str(tmp_path / "saved"), "openai/clip-vit-large-patch14-336")
    assert "--vision-tower" in again.report.table() and "has its own" in again.report.table()

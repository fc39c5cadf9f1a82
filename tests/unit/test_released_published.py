"""A published PixelLM: in, on, and back out with every bit where it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import merge_lora_weights_and_save_hf_model as merge
from model.predictor import ModelFolderError, Predictor
from tests.golden.release_names import CLIP_POSITION_TABLE, state_dict_from_release
from tests.unit import released_folders as folders
from tests.unit.tiny_batches import ONE, make_batch, total_loss
from tools import convert_checkpoint
from utils.checkpoints.builder import (
    BuildError,
    BuiltModel,
    ModelOptions,
    TrainingRecipe,
    build_model,
    choose_trainable,
    merge_lora,
)
from utils.checkpoints.export import export_model, export_published
from utils.checkpoints.layouts.published_names import (
    RELEASE_CONSTANTS,
    RELEASE_IMAGE_MEAN,
    RELEASE_IMAGE_STD,
)
from utils.checkpoints.published_export import unused_shapes
from utils.checkpoints.tensor_files import open_tensors
from utils.cli.errors import explain, run_script

SIXTH, HALF = torch.full((2, 3), 1 / 6), torch.full((2,), 1 / 2)


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.write_eye(tmp_path_factory.mktemp("tower")))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("published")
    folders.write_published(place)
    return place


def read(folder: Path) -> folders.Tensors:
    return {name: stored.read() for name, stored in open_tensors(folder).items()}


def same(first: folders.Tensors, second: folders.Tensors) -> None:
    assert set(first) == set(second)
    unlike = [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])]
    assert not unlike


def outputs(built: BuiltModel) -> torch.Tensor:
    """Logits of text and masks for one image, in one row."""
    batch = make_batch(built.processor, [(0, ONE)], [(24, 40)])
    with torch.no_grad():
        output = built.model(**batch)
        text = built.model.get_output_embeddings()(output.last_hidden_state)
    return torch.cat([text.flatten(), *(masks.flatten() for masks in output.mask_logits)])


@pytest.mark.parametrize("form", folders.FORMS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_there_and_back_changes_no_bit(form: str, kind: torch.dtype, eye: str, tmp_path: Path) -> None:
    def in_kind(tensors: folders.Tensors) -> None:
        tensors.update({name: value.to(kind) for name, value in tensors.items()})

    tensors = folders.write_published(tmp_path / "theirs", form, in_kind)
    there = [str(tmp_path / "theirs"), str(tmp_path / "ours"), "--vision-tower", eye]
    assert run_script(convert_checkpoint.main, there) == 0
    back = [str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "published", "--max_shard_size", "9MB"]
    assert run_script(convert_checkpoint.main, back) == 0
    same(read(tmp_path / "back"), tensors)
    assert len(list((tmp_path / "back").glob("*.bin"))) > 1
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert first.items() <= second.items()
    vocabulary = [json.loads((tmp_path / n / "tokenizer.json").read_text()) for n in ("theirs", "back")]
    assert vocabulary[0] == vocabulary[1]


def test_release_numerics_are_chosen_and_saved(published: Path, eye: str, tmp_path: Path) -> None:
    built = build_model(str(published), eye)
    export_model(built, tmp_path / "ours")
    again = build_model(str(tmp_path / "ours"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    for one in (built, again, BuiltModel(loaded, again.processor, again.report)):
        config, processor = one.model.config, one.processor
        assert (config.token_fusion, config.scale_fusion, config.position_resize) == ("constant", "constant", "release")
        assert config.vision_feature_layers == [-2, -11] and config.image_size == processor.image_size == 448
        assert torch.equal(one.model.codebook.token_weights, SIXTH)
        assert torch.equal(one.model.pixel_decoder.scale_weights, HALF)
        assert processor.image_mean == list(RELEASE_IMAGE_MEAN) and processor.image_std == list(RELEASE_IMAGE_STD)
        assert not processor.pad_before_normalize
        assert (config.group_rule, processor.text_rules) == ("release", "release")
        # No row for the image's placeholder: the head predicts what the original's predicts.
        assert one.model.get_output_embeddings().weight.shape[0] == folders.ROWS == processor.image_token_id
        same(dict(one.model.state_dict()), dict(built.model.state_dict()))
    assert torch.equal(outputs(again), outputs(built))
    # transformers leaves tensors where they lie in the file, and sums depend on that in their last bits.
    unlike = outputs(BuiltModel(loaded, again.processor, again.report)) - outputs(built)
    assert unlike.abs().max() <= 1e-5 * outputs(built).abs().max()


ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, batch, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
# Sums depend in their last bits on where numbers lie in memory, and these lie where they do in the file.
model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
with torch.no_grad():
    output = model(**torch.load(batch))
    text = model.get_output_embeddings()(output.last_hidden_state)
torch.save({"module": type(model).__module__, "text": text, "masks": output.mask_logits}, out)
"""


def test_elsewhere_logits_and_masks_are_the_same(
    published: Path, eye: str, elsewhere_env: dict[str, str], tmp_path: Path
) -> None:
    """ours -> safetensors -> from_pretrained in a process that has nothing of this repository but the folder."""
    built = build_model(str(published), eye)
    export_model(built, tmp_path / "ours", max_shard_size="9MB")
    batch = make_batch(built.processor, [(0, ONE)], [(24, 40)])
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "script.py").write_text(ELSEWHERE)
    command = [sys.executable, "script.py", "ours", "batch.pt", "found.pt"]
    done = subprocess.run(
        command, cwd=tmp_path, env=elsewhere_env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert found["module"].startswith("transformers_modules.")
    with torch.no_grad():
        output = built.model(**batch)
        text = built.model.get_output_embeddings()(output.last_hidden_state)
    assert torch.equal(found["text"], text)
    assert all(torch.equal(one, other) for one, other in zip(found["masks"], output.mask_logits, strict=True))


def test_the_folder_gives_what_the_golden_numbers_were_checked_with(published: Path, eye: str) -> None:
    """The tests of golden numbers fill a model by `state_dict_from_release`; this is the same model."""
    built = build_model(str(published), eye)
    clip = read(Path(eye))
    expected = state_dict_from_release(read(published), clip, built.model.config)
    own = dict(built.model.state_dict())
    same({name: value for name, value in own.items() if name not in RELEASE_CONSTANTS}, expected)
    # The table has grown by the release's way of resizing, from 24 x 24 patches to 32 x 32.
    assert len(clip[CLIP_POSITION_TABLE]) == 1 + 24**2
    assert len(own["vision_tower.model.embeddings.position_embedding.weight"]) == 1 + 32**2


def test_nothing_is_random_and_all_is_said(published: Path, eye: str) -> None:
    report = build_model(str(published), eye).report
    assert set(report.newly_initialized) == {"codebook.token_weights", "pixel_decoder.scale_weights"}
    unused = {name for name in report.ignored if "vision_model" not in name}
    assert unused == {
        name for name in folders.NAMES["published"] if "inv_freq" in name or "point" in name or "downsc" in name
    }
    card = json.loads(json.dumps(report.as_dict()))
    assert card["layout"].startswith("a published PixelLM") and card["loaded"] == len(report.loaded)
    table = report.table()
    assert (
        "release numerics" in table and "no number depends on it" in table and "a number in the release's code" in table
    )


def test_made_up_tensors_have_the_published_names_and_shapes(published: Path, eye: str, tmp_path: Path) -> None:
    built = build_model(str(published), eye)
    shapes = {name: list(shape) for name, shape in unused_shapes(built.model.config).items()}
    expected = {name: shape for name, shape in folders.NAMES["published"].items() if name in build_ignored(built)}
    assert shapes == expected
    built.published = None
    said = export_published(built, tmp_path / "back")
    assert any("were made up" in sentence for sentence in said)
    found = {name: list(value.shape) for name, value in read(tmp_path / "back").items()}
    assert found == folders.NAMES["published"]
    frequencies = read(tmp_path / "back")["model.layers.0.self_attn.rotary_emb.inv_freq"]
    torch.testing.assert_close(frequencies, built.model.language_model.model.rotary_emb.inv_freq)


def build_ignored(built: BuiltModel) -> set[str]:
    return {name for name in built.report.ignored if name.startswith("model.")}


def test_it_trains_on_under_our_recipe(published: Path, eye: str, tmp_path: Path) -> None:
    export_model(build_model(str(published), eye), tmp_path / "ours")
    for version, tower in ((published, eye), (tmp_path / "ours", None)):
        built = build_model(str(version), tower, to_train=True)
        config = built.model.config
        assert (config.token_fusion, config.scale_fusion, config.position_resize) == ("learned", "learned", "release")
        assert torch.equal(built.model.codebook.token_weights, SIXTH)
        assert config.refinement_alpha == 2 and config.bce_loss_weight == 2
        trained = set(choose_trainable(built.model, TrainingRecipe(lora_r=2)))
        assert {"codebook.token_weights", "pixel_decoder.scale_weights", "pixel_decoder.neck.0.weight"} <= trained
        assert "pixel_decoder.no_mask_embed.weight" in trained
        assert built.processor.image_mean == list(RELEASE_IMAGE_MEAN)
        assert (config.group_rule, built.processor.text_rules) == ("release", "release")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_training_keeps_the_stored_types_and_whole_buffers(kind: torch.dtype, eye: str, tmp_path: Path) -> None:
    """The training script then gives every tensor the type it trains or rests in."""

    def in_kind(tensors: folders.Tensors) -> None:
        tensors.update({name: value.to(kind) for name, value in tensors.items()})

    folders.write_published(tmp_path, change=in_kind)
    built = build_model(str(tmp_path), eye, dtype=None, to_train=True)
    kinds = {name: parameter.dtype for name, parameter in built.model.named_parameters()}
    assert kinds["language_model.lm_head.weight"] == kind
    assert kinds["codebook.token_weights"] == torch.float32
    assert {buffer.dtype for buffer in built.model.buffers()} == {torch.float32, torch.int64}
    released = build_model(str(tmp_path), eye, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in released.model.parameters()} == {torch.bfloat16}
    assert released.model.codebook.token_weights[0, 0].item() == 0.1669921875  # fact M1
    assert released.model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


def train_a_step(built: BuiltModel) -> None:
    choose_trainable(built.model, TrainingRecipe(lora_r=2, lora_dropout=0))
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    built.model.train()
    parameters = [p for p in built.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    total_loss(built.model, built.model(**make_batch(built.processor, [(0, ONE)], [(24, 40)])).losses).backward()
    optimizer.step()
    built.model.eval()


def test_trained_with_fixed_fusion_it_goes_back(published: Path, eye: str, tmp_path: Path) -> None:
    fixed = ModelOptions(token_fusion="constant", scale_fusion="constant")
    built = build_model(str(published), eye, fixed, to_train=True)
    train_a_step(built)
    unmerged = outputs(built)
    merge_lora(built.model)
    assert (outputs(built) - unmerged).abs().max() <= 1e-5 * max(1.0, float(unmerged.abs().max()))
    export_model(built, tmp_path / "trained")
    again = build_model(str(tmp_path / "trained"))
    export_published(again, tmp_path / "back")
    found, before = read(tmp_path / "back"), read(published)
    assert set(found) == set(before)
    assert not torch.equal(found["model.image_feature_neck.0.weight"], before["model.image_feature_neck.0.weight"])
    kept = [name for name in before if "point" in name or "downscaling" in name or "inv_freq" in name]
    assert kept and all(torch.equal(found[name], before[name]) for name in kept)
    reread = build_model(str(tmp_path / "back"), eye)
    assert torch.equal(outputs(reread), outputs(again))


def test_learned_fusion_does_not_go_back_and_says_where_it_differs(published: Path, eye: str, tmp_path: Path) -> None:
    built = build_model(str(published), eye, to_train=True)
    with torch.no_grad():
        built.model.codebook.token_weights[1, 2] = 0.25
        built.model.pixel_decoder.scale_weights[0] = 0.75
    built.processor.image_mean = [1.0, 2.0, 3.0]
    with pytest.raises(BuildError) as error:
        export_published(built, tmp_path / "back")
    said = str(error.value)
    assert "codebook.token_weights: found 0.25, expected 0.166667" in said
    assert "pixel_decoder.scale_weights: found 0.75, expected 0.5" in said
    assert "image_mean: found [1.0, 2.0, 3.0], expected [123.675" in said and "--token_fusion constant" in said
    assert not (tmp_path / "back").exists()


def test_the_tower_comes_from_its_flag_or_not_at_all(published: Path) -> None:
    with pytest.raises(BuildError, match=r"needs its vision tower .*'openai/clip-vit'.* with --vision-tower$") as error:
        build_model(str(published))
    assert explain(error.value) is not None


def test_chat_says_that_it_has_to_be_converted(published: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"type 'llava'.*convert a published PixelLM with tools/convert_check"):
        Predictor.from_pretrained(published, device="cpu")


def rename(tensors: folders.Tensors) -> None:
    tensors["model.mask_decoder.levels"] = tensors.pop("model.mask_decoder.level_embed.weight")


BROKEN = {
    "lacking": (
        lambda t: t.pop("model.mask_decoder.level_embed.weight"),
        "'model.mask_decoder.level_embed.weight' is missing",
    ),
    "renamed": (rename, "'model.mask_decoder.levels' does not belong to a published PixelLM"),
    "reshaped": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"'model.norm.weight' has another shape than this model \(found \[3\], expected \[64\]\)",
    ),
    "nan": (
        lambda t: t["lm_head.weight"][5, 5:].fill_(torch.nan),
        "'lm_head.weight' holds values that are not finite",
    ),
    "vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": torch.ones(600, 64)}),
        r"'model.embed_tokens.weight' has another shape .*found \[600, 64\], expected \[568, 64\]",
    ),
    "truncated": (None, r"is not a whole file of weights"),
}


@pytest.mark.parametrize(
    ("how", "form"),
    [
        *((how, form) for how in BROKEN for form in ("model.safetensors", "pytorch_model.bin")),
        ("truncated", folders.OLD),
    ],
)
def test_a_broken_one_gets_one_sentence_with_the_tensor(how: str, form: str, eye: str, tmp_path: Path) -> None:
    change, said = BROKEN[how]
    folders.write_published(tmp_path, form, change)
    if change is None:
        (file,) = (*tmp_path.glob("*.bin"), *tmp_path.glob("*.safetensors"))
        os.truncate(file, file.stat().st_size * 2 // 3)
    with pytest.raises(BuildError, match=said) as error:
        build_model(str(tmp_path), eye)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_tokenizer_of_another_model(eye: str, tmp_path: Path) -> None:
    folders.write_published(tmp_path)
    folders.write_tokenizer(tmp_path, tuple(f"word{number}" for number in range(9)))
    with pytest.raises(BuildError, match=r"'model.embed_tokens.weight' has 568 rows, but its tokenizer .* are 577"):
        build_model(str(tmp_path), eye)


def test_a_tokenizer_that_lost_its_added_tokens_gets_them_again(published: Path, eye: str, tmp_path: Path) -> None:
    folders.write_published(tmp_path)
    folders.write_tokenizer(tmp_path)
    first, second = build_model(str(published), eye), build_model(str(tmp_path), eye)
    assert first.processor.seg_token_ids == second.processor.seg_token_ids == list(range(560, 566))
    assert torch.equal(outputs(first), outputs(second))


def test_a_sentencepiece_tokenizer_as_it_was_published(eye: str, tmp_path: Path) -> None:
    """tokenizer.model and the list of added tokens, as the original saves them; they come back unchanged."""
    tensors = folders.write_published(tmp_path / "theirs")
    for file in (tmp_path / "theirs").glob("*token*"):
        file.unlink()
    added = [*(f"[SEG{number}]" for number in range(6)), "<im_start>", "<im_end>"]
    files = {
        "tokenizer.model": (folders.FIXTURES / "tokenizer.model").read_bytes(),
        "added_tokens.json": json.dumps({name: folders.PIECES + n for n, name in enumerate(added)}).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer", "model_max_length": 512}',
    }
    for name, content in files.items():
        (tmp_path / "theirs" / name).write_bytes(content)
    built = build_model(str(tmp_path / "theirs"), eye)
    assert built.processor.seg_token_ids == list(range(560, 566))
    export_model(built, tmp_path / "ours")
    again = build_model(str(tmp_path / "ours"))
    assert torch.equal(outputs(again), outputs(built))
    export_published(again, tmp_path / "back")
    assert all((tmp_path / "back" / name).read_bytes() == content for name, content in files.items())
    same(read(tmp_path / "back"), tensors)


def test_what_no_weight_depends_on_may_be_ours(published: Path, eye: str, tmp_path: Path) -> None:
    """A broken group costs its own mask alone then, a long conversation loses whole turns; going back stays free."""
    built = build_model(str(published), eye, ModelOptions(group_rule="adjacent", text_rules="turns"))
    export_model(built, tmp_path / "ours")
    again = build_model(str(tmp_path / "ours"))
    assert (again.model.config.group_rule, again.processor.text_rules) == ("adjacent", "turns")
    assert export_published(again, tmp_path / "back")


def test_options_against_what_its_weights_fix(published: Path, eye: str) -> None:
    with pytest.raises(BuildError, match="holds 6 seg tokens, 3 for each scale, but --seg_token_num is 1"):
        build_model(str(published), eye, ModelOptions(tokens_per_scale=1))
    with pytest.raises(BuildError, match="num_scales is asked to be 3, but a published PixelLM has 2"):
        build_model(str(published), eye, ModelOptions(num_scales=3))


def test_the_originals_training_state_is_merged(eye: str, tmp_path: Path) -> None:
    """The command of the original's README: base, tower and the state that its training left."""
    tensors = folders.write_training_state(tmp_path / "run" / "pytorch_model.bin")
    folders.write_llava(tmp_path / "llava", "v1", "pytorch_model.bin")
    flags = [f"--version={tmp_path / 'llava'}", f"--vision-tower={eye}", f"--save_path={tmp_path / 'ours'}"]
    flags += [f"--weight={tmp_path / 'run' / 'pytorch_model.bin'}", "--precision=fp32"]
    with pytest.raises(BuildError, match=r"--weight .*pytorch_model.bin is the PEFT-wrapped .* needs its vision tower"):
        merge.main([flag for flag in flags if "vision-tower" not in flag])
    assert merge.main(flags) == 0
    own = build_model(str(tmp_path / "ours")).model.state_dict()
    prefix = "base_model.model."
    layer = "model.layers.1.self_attn.v_proj"
    low, high = (tensors[f"{prefix}{layer}.lora_{part}.default.weight"] for part in "AB")
    expected = tensors[f"{prefix}{layer}.weight"] + 16 / 8 * high @ low
    torch.testing.assert_close(own[f"language_model.{layer}.weight"], expected, atol=1e-6, rtol=0)
    eyes = f"{prefix}model.vision_tower.vision_tower.vision_model."
    for name, value in tensors.items():
        if name.startswith(eyes) and "position_ids" not in name:
            assert torch.equal(own[f"vision_tower.model.{name.removeprefix(eyes)}"], value), name
    assert torch.equal(own["pixel_decoder.neck.2.weight"], tensors[f"{prefix}model.image_feature_neck.2.weight"])
    assert torch.equal(own["codebook.token_weights"], SIXTH)
    # And as a folder of its own, with config and tokenizer beside it.
    folders.write_published(tmp_path / "folder")
    (tmp_path / "run" / "pytorch_model.bin").rename(tmp_path / "folder" / "pytorch_model.bin")
    built = build_model(str(tmp_path / "folder"), eye)
    assert "LoRA of 6 layers merged with alpha 16" in built.report.table()
    same(dict(built.model.state_dict()), own)
    export_published(built, tmp_path / "back")
    assert {n: list(v.shape) for n, v in read(tmp_path / "back").items()} == folders.NAMES["published"]


def test_a_second_merge_changes_nothing(eye: str, published: Path) -> None:
    built = build_model(str(published), eye, to_train=True)
    train_a_step(built)
    assert merge_lora(built.model) == 2 * folders.DEPTH
    merged = outputs(built)
    assert merge_lora(built.model) == 0
    assert torch.equal(outputs(built), merged)

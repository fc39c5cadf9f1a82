"""Every layout that a language model, a LLaVA or a tower was published in, and those that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from tests.unit import released_folders as folders
from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_batches import ONE, make_batch
from utils.checkpoints.builder import BuildError, BuiltModel, ModelOptions, build_model
from utils.checkpoints.export import export_model
from utils.checkpoints.layouts import recognise
from utils.checkpoints.tensor_files import open_tensors
from utils.cli.errors import explain

LLAVAS = ("v1", "1.5", "old transformers", "new transformers")
IN_TRANSFORMERS = LLAVAS[2:]


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.write_eye(tmp_path_factory.mktemp("tower")))


def small(**changes: Any) -> ModelOptions:
    return options("llava_v1", **changes)


def finite(built: BuiltModel) -> bool:
    losses = built.model(**make_batch(built.processor, [(0, ONE)], [(24, 40)])).losses
    return all(bool(torch.isfinite(term.sum)) for term in losses.values())


@pytest.mark.parametrize("layout", LLAVAS)
@pytest.mark.parametrize("form", folders.FORMS)
def test_a_llava_becomes_a_pixellm(layout: str, form: str, eye: str, tmp_path: Path) -> None:
    tensors = folders.write_llava(tmp_path, layout, form)
    beside = None if layout in IN_TRANSFORMERS else eye
    built = build_model(str(tmp_path), beside, small())
    own, table = built.model.state_dict(), built.report.table()
    for name in ("embed_tokens.weight", "layers.2.mlp.down_proj.weight", "norm.weight"):
        (theirs,) = [value for their_name, value in tensors.items() if their_name.endswith(f".{name}")]
        assert torch.equal(own[f"language_model.model.{name}"][: len(theirs)], theirs)
    (head,) = [value for name, value in tensors.items() if name.endswith("lm_head.weight")]
    assert torch.equal(own["language_model.lm_head.weight"][: len(head)], head)
    source = {name: stored.read() for name, stored in open_tensors(tmp_path if beside is None else Path(eye)).items()}
    (patches,) = [value for name, value in source.items() if name.endswith("embeddings.patch_embedding.weight")]
    assert torch.equal(own["vision_tower.model.embeddings.patch_embedding.weight"], patches)
    assert finite(built)
    new = {name.split(".")[0] for name in built.report.newly_initialized}
    assert new == {"projector", "mask_projector", "codebook", "pixel_decoder", "language_model"}
    assert ("half of its hidden units" in table) == (layout != "v1")
    assert "LLaVA" in table and ("one linear layer" in table) == (layout == "v1")
    recorded = set(built.report.loaded) | set(built.report.newly_initialized)
    recorded -= {"language_model.embeddings", "projector.hidden_units"}
    assert recorded == set(own), "every tensor is loaded, or new for a reason"
    assert all(built.report.newly_initialized.values())


@pytest.mark.parametrize("layout", LLAVAS[1:])
def test_the_projector_of_llava_15_gives_its_numbers(layout: str, eye: str, tmp_path: Path) -> None:
    tensors = folders.write_llava(tmp_path, layout, "model.safetensors")
    built = build_model(str(tmp_path), None if layout in IN_TRANSFORMERS else eye, small())
    names = ("linear_1", "linear_2") if layout in IN_TRANSFORMERS else ("mm_projector.0", "mm_projector.2")
    first, second = (
        [next(v for n, v in tensors.items() if n.endswith(f"{name}.{leaf}")) for leaf in ("weight", "bias")]
        for name in names
    )
    features = torch.randn(7, folders.EYE_WIDTH)
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(features, *first))
    expected = torch.nn.functional.linear(hidden, *second)
    torch.testing.assert_close(built.model.projector(features), expected, atol=1e-6, rtol=1e-5)


def test_transformers_reads_the_same_language_model(tmp_path: Path) -> None:
    folders.write_llava(tmp_path, "old transformers", "sharded model.safetensors")
    built = build_model(str(tmp_path), None, small())
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = whole(input_ids=ids).logits
        ours = built.model.language_model(input_ids=ids).logits[..., : theirs.shape[-1]]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_tower_inside_a_first_published_llava_is_taken(eye: str, tmp_path: Path) -> None:
    tensors = folders.write_llava(tmp_path, "1.5", "pytorch_model.bin", tower_inside=True)
    built = build_model(str(tmp_path), eye, small())
    name = "embeddings.patch_embedding.weight"
    theirs = tensors[f"model.vision_tower.vision_tower.vision_model.{name}"]
    assert torch.equal(built.model.state_dict()[f"vision_tower.model.{name}"], theirs)
    assert "only the config" in built.report.table()


def test_lora_around_a_llava_is_merged(eye: str, tmp_path: Path) -> None:
    tensors = folders.write_llava(tmp_path, "1.5", "pytorch_model.bin")
    layer = "model.layers.1.self_attn.q_proj"
    low, high = torch.randn(2, folders.WIDTH), torch.randn(folders.WIDTH, 2)
    wrapped = {f"base_model.model.{name}": value for name, value in tensors.items()}
    wrapped |= {f"base_model.model.{layer}.lora_{part}.default.weight": m for part, m in (("A", low), ("B", high))}
    folders.write_weights(wrapped, tmp_path, "pytorch_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
    built = build_model(str(tmp_path), eye, small())
    expected = tensors[f"{layer}.weight"] + 6 / 2 * high @ low
    torch.testing.assert_close(built.model.state_dict()[f"language_model.{layer}.weight"], expected)
    assert "PEFT-wrapped" in built.report.layout and "LoRA of 1 layers merged" in built.report.layout
    del wrapped[f"base_model.model.{layer}.lora_B.default.weight"]
    folders.write_weights(wrapped, tmp_path, "pytorch_model.bin")
    with pytest.raises(BuildError, match=rf"tensor '{layer}.lora_B.default.weight' is missing, to which"):
        build_model(str(tmp_path), eye, small())


SPOILT = [
    ("lacking", lambda t, name: t.pop(name), "'{name}' is missing"),
    ("renamed", lambda t, name: t.update({f"{name}s": t.pop(name)}), "'{name}' is missing"),
    ("reshaped", lambda t, name: t.update({name: torch.ones(3)}), r"'{name}' has another shape .*found \[3\]"),
    ("nan", lambda t, name: t[name].view(-1)[-1:].fill_(torch.inf), "'{name}' holds values that are not finite"),
]


@pytest.mark.parametrize("layout", LLAVAS)
@pytest.mark.parametrize(("how", "change", "said"), SPOILT, ids=[how for how, *_ in SPOILT])
def test_a_broken_llava_names_its_own_tensor(
    layout: str, how: str, change: Any, said: str, eye: str, tmp_path: Path
) -> None:
    tensors = folders.write_llava(tmp_path, layout, "model.safetensors")
    names = [name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight")]
    if layout in IN_TRANSFORMERS:
        names += [name for name in tensors if name.endswith("encoder.layers.3.mlp.fc1.weight")]
    for name in names:
        spoilt = {other: value.clone() for other, value in tensors.items()}
        change(spoilt, name)
        folders.write_weights(spoilt, tmp_path, "model.safetensors")
        with pytest.raises(BuildError, match=said.format(name=name)) as error:
            build_model(str(tmp_path), None if layout in IN_TRANSFORMERS else eye, small())
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_llava_names_the_tower_it_needs(eye: str, tmp_path: Path) -> None:
    folders.write_llava(tmp_path, "1.5", "pytorch_model.bin")
    with pytest.raises(BuildError, match=r"whose vision tower \(its config names 'openai/clip-vit'\) stands apart"):
        build_model(str(tmp_path), None, small())
    config = json.loads((tmp_path / "config.json").read_text())
    folders.write_config(tmp_path, {**config, "mm_vision_tower": eye})
    assert finite(build_model(str(tmp_path), None, small()))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", folders.FORMS[1:])
def test_plain_language_models_and_towers_in_every_form(kind: str, form: str, tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", kind, tie_word_embeddings=kind == "qwen2")
    for number, tower in enumerate(("clip", "siglip_whole")):
        eye = write_tower(tmp_path / tower, tower)
        first = build_model(str(base), str(eye), options())
        again = tmp_path / f"{number}"
        for source in (base, eye):
            tensors = {name: stored.read().clone() for name, stored in open_tensors(source).items()}
            folders.write_weights(tensors, again / source.name, form)
            for file in source.iterdir():
                if file.suffix != ".safetensors":
                    (again / source.name / file.name).write_bytes(file.read_bytes())
        second = build_model(str(again / "base"), str(again / tower), options())
        loaded = set(first.report.loaded)
        assert set(second.report.loaded) == loaded
        old = len(first.processor.tokenizer) - 9
        own = second.model.state_dict()
        for name, value in first.model.state_dict().items():
            if name in loaded:
                rows = old if "embed_tokens" in name or "lm_head" in name else None
                assert torch.equal(own[name][:rows], value[:rows]), name


def test_a_first_published_tower_is_read(eye: str) -> None:
    assert recognise(Path(eye)).layout.title == "a vision tower"


RELATIVES = [
    ("LISA", {"model.visual_model.mask_decoder.iou_token.weight": 1}, {"model_type": "llava"}),
    ("LISA", {"base_model.model.model.visual_model.image_encoder.pos_embed": 1}, {}),
    ("LISA", {}, {"architectures": ["LISAForCausalLM"], "model_type": "llava"}),
    ("GSVA", {"model.visual_model.pixel_mean": 1}, {"architectures": ["LisaGSVAForCausalLM"]}),
    ("GLaMM", {"model.grounding_encoder.pixel_mean": 1}, {"model_type": "llava"}),
    ("GLaMM", {}, {"architectures": ["GLaMMForCausalLM"]}),
    ("Sa2VA", {"grounding_encoder.sam2_model.no_mem_embed": 1}, {}),
    ("Sa2VA", {}, {"model_type": "sa2va_chat"}),
]


@pytest.mark.parametrize(("who", "names", "config"), RELATIVES)
def test_relatives_are_refused_with_the_reason(who: str, names: dict, config: dict, tmp_path: Path) -> None:
    folders.write_config(tmp_path, config)
    if names:
        folders.write_weights(dict.fromkeys(names, torch.ones(1)), tmp_path, "pytorch_model.bin")
    with pytest.raises(BuildError, match=rf"is a checkpoint of {who} \(.*\): its masks come from SAM") as error:
        build_model(str(tmp_path))
    assert explain(error.value) is not None and "\n" not in str(error.value)


def test_an_unknown_checkpoint_is_compared_with_the_nearest_layout(tmp_path: Path) -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.mm_projector.weight", "extra.x"]
    folders.write_weights({name: torch.ones(2) for name in names if "mm" not in name}, tmp_path, "model.safetensors")
    folders.write_config(tmp_path, {"model_type": "wonder"})
    with pytest.raises(BuildError) as error:
        build_model(str(tmp_path))
    said = str(error.value)
    assert "wonder" in said and "the nearest layout is a plain language model" in said
    assert "missing model.layers.0.self_attn.q_proj.weight" in said and "there are also extra.x" in said
    assert "found model.embed_tokens.weight, model.norm.weight and 1 more" in said


def test_normalisation_is_not_lisa(tmp_path: Path) -> None:
    """The four letters occur in other words."""
    base = write_language_model(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    folders.write_config(base, {**config, "normalisation": "rms"})
    assert build_model(str(base), str(write_tower(tmp_path / "tower", "clip")), options())


def test_a_tokenizer_with_more_words_than_the_table(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", "llama")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    last = max(entry["id"] for entry in tokenizer["added_tokens"]) if tokenizer["added_tokens"] else 0
    size = len(tokenizer["model"]["vocab"])
    extra = {"id": max(size, last + 1), "content": "<more>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({**extra, "normalized": False, "special": True})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BuildError, match=r"'model.embed_tokens.weight' has \d+ rows, but the tokenizer beside it"):
        build_model(str(base), str(write_tower(tmp_path / "tower", "clip")), options())


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", folders.OLD])
def test_a_cut_off_file_gets_one_sentence(form: str, tmp_path: Path) -> None:
    tensors = {f"layers.{number}.weight": torch.ones(50, 50) for number in range(9)}
    folders.write_weights(tensors, tmp_path, form)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    assert set(open_tensors(tmp_path)) == set(tensors)
    for length in (0, 30, 400, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            BuildError, match=r"is not a whole file of weights \(.+\): export or copy it again$"
        ) as error:
            open_tensors(tmp_path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", folders.OLD])
def test_damaged_bytes_give_one_sentence_or_numbers(form: str, tmp_path: Path) -> None:
    """Bytes of a pickle are a program, so that its readers fail in many ways."""
    folders.write_weights({f"layers.{number}.weight": torch.ones(3) for number in range(9)}, tmp_path, form)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    chosen = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(100):
        place, byte = (int(torch.randint(limit, (), generator=chosen)) for limit in (min(len(whole), 3000), 256))
        file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            for stored in open_tensors(tmp_path).values():
                stored.read()
        except BuildError as error:
            refused += 1
            assert "\n" not in str(error) and str(file) in str(error)
    assert refused > 5


def test_shards_that_do_not_match_their_index(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    folders.write_weights(tensors, tmp_path, "sharded model.safetensors")
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"c": torch.ones(2)}, shard)
    with pytest.raises(BuildError, match=r"tensor 'b' is missing from .*00002-of-00002.safetensors, where the index"):
        open_tensors(tmp_path)
    shard.unlink()
    with pytest.raises(BuildError, match=r"which is not beside it \(tensor 'b' is in it\): copy all of the folder"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(BuildError, match=r"shards of weights but no model.safetensors.index.json"):
        open_tensors(tmp_path)


class Surprise:
    """Something that unpickling would run."""

    ran = False

    def __reduce__(self) -> Any:
        return (_run, ())


def _run() -> None:
    Surprise.ran = True


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_with_code_is_refused_unread(new: bool, eye: str, tmp_path: Path) -> None:
    folders.write_published(tmp_path)
    weights = {"model.norm.weight": torch.ones(2), "x": Surprise()}
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(BuildError, match=r"asks for .*_run, which could run code, and was refused unread"):
        build_model(str(tmp_path), eye)
    assert not Surprise.ran


def test_files_of_old_pytorch_are_read(tmp_path: Path) -> None:
    """Parts of one storage, axes in another order, one tensor under two names."""
    flat = torch.arange(24.0)
    tensors = {"a": torch.randn(3), "part": flat[5:11], "turned": flat[12:].view(3, 4).T, "empty": torch.ones(0)}
    tensors |= {"half": torch.randn(2, 2).half(), "scalar": torch.tensor(7), "flags": torch.tensor([True, False])}
    tensors["tied"] = tensors["half"]
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    found = open_tensors(tmp_path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        read = found[name].read()
        assert torch.equal(read, value) and read.dtype == value.dtype and found[name].shape == value.shape, name


def test_a_folder_written_here_is_read_again_from_bin(eye: str, tmp_path: Path) -> None:
    folders.write_llava(tmp_path / "llava", "v1", "pytorch_model.bin")
    built = build_model(str(tmp_path / "llava"), eye, small())
    export_model(built, tmp_path / "ours", max_shard_size="300KB")
    again = build_model(str(tmp_path / "ours"))
    tensors = {name: stored.read().clone() for name, stored in open_tensors(tmp_path / "ours").items()}
    for old in (tmp_path / "ours").glob("model*"):
        if "safetensors" in old.name:
            old.unlink()
    folders.write_weights(tensors, tmp_path / "ours", "sharded pytorch_model.bin")
    third = build_model(str(tmp_path / "ours"))
    for name, value in built.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
        assert torch.equal(third.model.state_dict()[name], value), name

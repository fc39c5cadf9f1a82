"""Folders that are not whole, and language models we would read wrongly: one sentence that names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_batches import ONE, TWO, make_batch
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import BuildError, ModelOptions, build_model, save_model
from utils.cli.errors import explain

Change = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` (a llama), `tower` (a CLIP) and `pixellm`."""
    place = tmp_path_factory.mktemp("whole")
    write_language_model(place / "base", "llama")
    write_tower(place / "tower", "clip")
    built = make_model()
    save_model(built.model, built.processor, place / "pixellm")
    return place


def tensors(change: Callable[[Tensors], object]) -> Change:
    """A change of the tensors in a folder."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {name: value.clone() for name, value in load_file(path).items()}
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return apply


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def half(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def edit(name: str, **changes: object) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))


UP, PATCHES, FUSION = "model.layers.1.mlp.up_proj.weight", "embeddings.patch_embedding.weight", "codebook.token_weights"


def spoilt(name: str) -> list[tuple[Change, str]]:
    """Every way a file of weights can be spoilt, and what is said."""
    return [
        (half("model.safetensors"), "is not a whole file of weights"),
        (without("model.safetensors"), "model.safetensors"),
        (tensors(lambda t: t.pop(name)), rf"tensor '?{name}'? is missing"),
        (tensors(lambda t: t[name].view(-1)[:1].fill_(torch.nan)), rf"tensor '?{name}'? holds values that are not"),
        (tensors(lambda t: t.update({name: torch.ones(3)})), rf"tensor '?{name}.*\[3\]"),
    ]


CONFIGS = [
    (without("config.json"), "holds no config.json"),
    (half("config.json"), "config.json is not a config"),
    (text("config.json", '{"model_type": "wonder"}'), "model type `wonder`"),
    (text("config.json", "{}"), "config.json is not a config"),
]
IN_BASE = [
    *spoilt(UP),
    *CONFIGS,
    (text("config.json", '{"model_type": "clip_vision_model"}'), "expected a language model"),
    (without("tokenizer.json"), "no tokenizer"),
    (half("tokenizer.json"), "no tokenizer"),
    (text("chat_template.jinja", "hello"), "chat template"),
    (edit("tokenizer_config.json", eos_token=None), "no end token"),
]
IN_TOWER = [
    *spoilt(PATCHES),
    *CONFIGS,
    (text("config.json", '{"model_type": "llama"}'), "is of type 'llama': expected one of clip_vision_model"),
]
IN_PIXELLM = [
    *spoilt(FUSION),
    *CONFIGS,
    (tensors(lambda t: t.update({"sam.weight": torch.ones(1)})), "'sam.weight' is not part of this model"),
    (text("model.safetensors.index.json", "[]"), "not an index of weights"),
    (
        text("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors., which is not beside it",
    ),
    (without("processor_config.json"), "processor_config.json is missing"),
    (half("processor_config.json"), "processor .* cannot be read"),
    (edit("processor_config.json", image_size=64), "processor's image_size is 64, the model's 32"),
    (half("tokenizer.json"), "processor .* cannot be read"),
    (without("tokenizer.json"), "processor .* cannot be read"),
]
CASES = [("base", *case) for case in IN_BASE] + [("tower", *case) for case in IN_TOWER]
CASES += [("pixellm", *case) for case in IN_PIXELLM]


@pytest.mark.parametrize(("part", "change", "said"), CASES, ids=[f"{part}-{said}" for part, _, said in CASES])
def test_a_broken_folder_gets_one_sentence(part: str, change: Change, said: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / part, tmp_path / part)
    change(tmp_path / part)
    here = {name: str(tmp_path / name if name == part else folders / name) for name in ("base", "tower", "pixellm")}
    with pytest.raises(BuildError, match=said) as error:
        build_model(here["pixellm"]) if part == "pixellm" else build_model(here["base"], here["tower"], options())
    sentence = explain(error.value)
    assert sentence is not None and "\n" not in str(error.value) and len(sentence) < 500 + len(str(tmp_path))
    assert str(tmp_path / part) in sentence or "tokenizer" in said or "template" in said or "end token" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_scales": 3}, "one layer per scale"),
        ({"tokens_per_scale": 1}, r"'codebook.token_weights' has another shape .*found \[2, 3\], expected \[2, 1\]"),
        ({"embedding_dim": 32}, "has another shape"),
        ({"image_size": 30}, "multiple of patch_size"),
        ({"vision_feature_layers": [-2, -30]}, "do not exist in a tower of 4 layers"),
        ({"refinement_alpha": 0.5}, "refinement_alpha must be at least 1"),
        ({"token_fusion": "none"}, "token_fusion and scale_fusion must be one of"),
        ({"conversation_format": "vicuna"}, "'vicuna' is not known: choose one of llava_v1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_named(change: dict, said: str, folders: Path) -> None:
    with pytest.raises(BuildError, match=said):
        build_model(str(folders / "pixellm"), options=ModelOptions(**change))


def test_a_folder_that_is_missing(folders: Path) -> None:
    for version in ("", "liuhaotian/LLaVA-Lightning-7B-v1-1"):
        with pytest.raises(BuildError, match=f"--version '{version}' is not a folder on this machine"):
            build_model(version)
    with pytest.raises(BuildError, match="is a plain language model \\(llama\\): --vision-tower is needed"):
        build_model(str(folders / "base"))
    with pytest.raises(BuildError, match="--vision-tower 'openai/clip' is not a folder"):
        build_model(str(folders / "base"), "openai/clip", options())


def test_flash_attention_that_is_absent(folders: Path) -> None:
    for arguments in ((folders / "pixellm",), (folders / "base", folders / "tower", options())):
        with pytest.raises(BuildError, match=r"flash_attention_2 needs the package flash-attn .* choose sdpa"):
            build_model(*map(_as_text, arguments), attn_implementation="flash_attention_2")


def _as_text(argument: object) -> object:
    return str(argument) if isinstance(argument, Path) else argument


# Kinds whose logits are their head on their final states, though their layers are other ones than we know …
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_language_model_with_a_plain_head_is_taken(
    kind: str, dtype: torch.dtype, folders: Path, tmp_path: Path
) -> None:
    base = write_language_model(tmp_path / "base", kind, **OWN_NAMES.get(kind, {}))
    built = build_model(str(base), str(folders / "tower"), options(), dtype=dtype)
    losses = built.model(**make_batch(built.processor, [(0, ONE), (0, TWO)], [(16, 24)])).losses
    assert all(torch.isfinite(term.sum) for term in losses.values())
    save_model(built.model, built.processor, tmp_path / "saved")
    again = build_model(str(tmp_path / "saved"), dtype=dtype)
    own = built.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.model.state_dict().items())


# … and kinds that cap or scale their logits, or count positions by themselves.
OWN_NAMES: dict[str, dict] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "granite": {"logits_scaling": 8.0},
    "bert": {"is_decoder": True},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("gemma2", torch.float32),
        ("gemma2", torch.bfloat16),
        ("cohere", torch.float32),
        ("granite", torch.bfloat16),
        ("mpt", torch.float32),
        ("mamba", torch.float32),
        ("bert", torch.float32),
    ],
)
def test_a_language_model_with_more_than_a_head_is_refused(
    kind: str, dtype: torch.dtype, folders: Path, tmp_path: Path
) -> None:
    base = write_language_model(tmp_path / "base", kind, **OWN_NAMES.get(kind, {}))
    with pytest.raises(BuildError, match=f"language models of type '{kind}' are not supported"):
        build_model(str(base), str(folders / "tower"), options(), dtype=dtype, attn_implementation="eager")

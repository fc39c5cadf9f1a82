"""Folders as others published them, made up: names, shapes and configs are real, numbers are random."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from model.processing_pixellm import IMAGE_END_TOKEN, IMAGE_START_TOKEN
from tests.golden.release_names import CLIP_POSITION_TABLE
from tests.unit.tokenizer_kinds import FIXTURES

Tensors = dict[str, torch.Tensor]
FORMS = ("model.safetensors", "pytorch_model.bin", "sharded model.safetensors", "sharded pytorch_model.bin")
OLD = "old pytorch_model.bin"  # as PyTorch wrote it before its files were archives
GROUP, WIDTH, EYE_WIDTH, DEPTH, EYE_DEPTH, SIDE, PATCH = 6, 64, 32, 3, 12, 336, 14
PIECES = 560  # of the fixtures' tokenizer
ROWS = PIECES + GROUP + 2
_RECORDED_ROWS = 264  # the lists of names are of a model with fewer words
NAMES: dict[str, dict[str, list[int]]] = {
    kind: {name: [ROWS if side == _RECORDED_ROWS else side for side in shape] for name, shape in shapes.items()}
    for kind, shapes in json.loads((FIXTURES / "published_names.json").read_text(encoding="utf-8")).items()
}
TEXT = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EYE = {
    "hidden_size": EYE_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": EYE_DEPTH,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
}
ORIGINAL = {**TEXT, "mm_hidden_size": EYE_WIDTH, "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit"}
PUBLISHED = {
    **ORIGINAL,
    "model_type": "llava",
    "architectures": ["PixelLMForCausalLM"],
    "out_dim": 256,
    "resize_vision_tower_size": 448,
    "train_mask_decoder": True,
}


def random_tensors(shapes: dict[str, list[int]], seed: int = 0) -> Tensors:
    """Small random numbers for every name; norms around one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = 0.1 * torch.randn(shape, generator=generator)
        tensors[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    return tensors


def write_weights(tensors: Tensors, folder: Path, form: str) -> None:
    """Tensors in one of FORMS, or OLD."""
    folder.mkdir(parents=True, exist_ok=True)
    *how, whole = form.split(" ")
    parts = {whole: sorted(tensors)}
    if "sharded" in how:
        stem, suffix = whole.split(".")
        names = sorted(tensors)
        parts = {f"{stem}-0000{part}-of-00002.{suffix}": names[part - 1 :: 2] for part in (1, 2)}
        index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
        (folder / f"{whole}.index.json").write_text(json.dumps(index))
    for file, members in parts.items():
        part = {name: tensors[name].contiguous() for name in members}
        if file.endswith(".safetensors"):
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization="old" not in how)


def write_tokenizer(folder: Path, names: tuple[str, ...] = ()) -> None:
    """The fixtures' sentencepiece tokenizer with further tokens."""
    tokenizer = LlamaTokenizer.from_pretrained(FIXTURES)
    tokenizer.add_tokens(list(names), special_tokens=True)
    tokenizer.save_pretrained(folder)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_eye(folder: Path, seed: int = 3) -> Path:
    """The CLIP tower, at its own resolution, with the prefix that its first publication had."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("clip_vision_model", **EYE)
    tensors = {f"vision_model.{name}": value for name, value in AutoModel.from_config(config).state_dict().items()}
    tensors[CLIP_POSITION_TABLE] = 0.1 * torch.randn_like(tensors[CLIP_POSITION_TABLE])
    write_weights(tensors, folder, "pytorch_model.bin")
    write_config(folder, config.to_dict())
    return folder


def write_published(
    folder: Path, form: str = "pytorch_model.bin", change: Callable[[Tensors], object] | None = None, **config: Any
) -> Tensors:
    """A published PixelLM; returns its tensors."""
    tensors = random_tensors(NAMES["published"])
    if change is not None:
        change(tensors)
    write_weights(tensors, folder, form)
    write_config(folder, {**PUBLISHED, **config})
    segs = tuple(f"[SEG{number}]" for number in range(GROUP))
    write_tokenizer(folder, (*segs, IMAGE_START_TOKEN, IMAGE_END_TOKEN))
    return tensors


def write_training_state(place: Path, seed: int = 1) -> Tensors:
    """What the original's training leaves, as a file; returns its tensors."""
    tensors = random_tensors(
        {name: shape for name, shape in NAMES["wrapped"].items() if "position_ids" not in name}, seed
    )
    (ids,) = [name for name in NAMES["wrapped"] if "position_ids" in name]
    tensors[ids] = torch.arange(NAMES["wrapped"][ids][1])[None]
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, place)
    return tensors


def write_llava(folder: Path, layout: str, form: str, tower_inside: bool = False) -> Tensors:
    """A LLaVA: "v1", "1.5", "old transformers" or "new transformers"; returns its tensors."""
    torch.manual_seed(5)
    text, eye = (
        AutoConfig.for_model("llama", **{**TEXT, "vocab_size": PIECES}),
        AutoConfig.for_model("clip_vision_model", **EYE),
    )
    config = LlavaConfig(text_config=text, vision_config=eye, image_token_index=PIECES - 1)
    model: PreTrainedModel = LlavaForConditionalGeneration(config)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if layout == "new transformers":
        tensors = {_with_prefix(name): value for name, value in state.items()}
        write_config(folder, config.to_dict())
    elif layout == "old transformers":
        tensors = {_as_first_in_transformers(_with_prefix(name)): value for name, value in state.items()}
        write_config(folder, config.to_dict())
    else:
        tensors = _as_first_published(state, layout, tower_inside)
        kind = "llava_llama" if layout == "1.5" else "llava"
        write_config(folder, {**ORIGINAL, "vocab_size": PIECES, "model_type": kind})
    write_weights(tensors, folder, form)
    write_tokenizer(folder)
    return tensors


def _with_prefix(name: str) -> str:
    """Published towers have one more level than those of today's transformers."""
    head, mark, rest = name.partition("vision_tower.")
    return f"{head}{mark}vision_model.{rest}" if mark and not rest.startswith("vision_model.") else name


def _as_first_in_transformers(name: str) -> str:
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def _as_first_published(state: Tensors, layout: str, tower_inside: bool) -> Tensors:
    tensors: Tensors = {}
    for name, value in state.items():
        if name.startswith("model.language_model."):
            tensors[name.replace("language_model.", "", 1)] = value
        elif name.startswith("model.multi_modal_projector.") and layout == "1.5":
            number = {"linear_1": 0, "linear_2": 2}[name.split(".")[2]]
            tensors[f"model.mm_projector.{number}.{name.split('.')[3]}"] = value
        elif name.startswith("lm_head"):
            tensors[name] = value
        elif "vision_tower" in name and tower_inside:
            rest = _with_prefix(name).removeprefix("model.vision_tower.")
            tensors[f"model.vision_tower.vision_tower.{rest}"] = value
    if layout == "v1":
        tensors["model.mm_projector.weight"] = 0.1 * torch.randn(WIDTH, EYE_WIDTH)
        tensors["model.mm_projector.bias"] = torch.zeros(WIDTH)
    tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(WIDTH // 8) for n in range(DEPTH)}
    return tensors


def language_model_of(folder: Path) -> PreTrainedModel:
    """transformers' own reading of a plain language model."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()

"""A published PixelLM in and out: its folder read into our names, and ours written so that the original code reads it.

What it holds and our model has no place for (tensors that no number depends on, its config, its tokenizer's files)
stands in `published/` of our folder, so that it can be given back unchanged.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor, required_vocab_size
from utils.checkpoints.bases import TOWER, TOWER_NAMES, sort_out
from utils.checkpoints.folders import BuildError, first_sentence
from utils.checkpoints.layouts import ADAPTER_CONFIG
from utils.checkpoints.released_checkpoints import (
    PIXELLM_UNUSED,
    RELEASE_COARSE_LAYER,
    RELEASE_CONSTANTS,
    RELEASE_DECODER,
    RELEASE_FINE_LAYER,
    RELEASE_IMAGE_MEAN,
    RELEASE_IMAGE_STD,
    RELEASE_IMAGE_TOKEN_POOL,
    RELEASE_NUM_SCALES,
    RELEASE_SIDE,
    RELEASE_TOKENS_PER_SCALE,
    TEXT_FIELDS,
    matches,
    name_from_pixellm,
    name_in_pixellm,
)
from utils.checkpoints.tensor_files import Stored, StoredTensor

REST_FOLDER, REST_TENSORS = "published", "extras.safetensors"
REST_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TABLE = "language_model.model.embed_tokens.weight"
RELEASE_LORA_ALPHA = 16
TOWER_PREFIX = "model.vision_tower.vision_tower."
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
_KEPT = "no number depends on it; kept for writing the published layout again"


@dataclass
class PublishedRest:
    """What a published PixelLM holds beside what our model has a place for.

    tensors: by their published names. files: content of its small files by name.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into a folder of ours."""
        place = folder / REST_FOLDER
        place.mkdir(exist_ok=True)
        # Old files may hold one storage twice, which safetensors does not write.
        save_file({name: value.clone() for name, value in self.tensors.items()}, place / REST_TENSORS)
        for name, content in self.files.items():
            (place / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> "PublishedRest | None":
        """Read it from a folder of ours; None where there is none. BuildError where it cannot be read."""
        place = folder / REST_FOLDER
        if not (place / REST_TENSORS).is_file():
            return None
        try:
            return cls(load_file(place / REST_TENSORS), small_files(place))
        except (SafetensorError, OSError) as error:
            raise BuildError(
                f"{place / REST_TENSORS} cannot be read ({first_sentence(error)}): copy it again, or remove the "
                f"folder {place} if the published layout is never to be written again"
            ) from error


def small_files(folder: Path) -> dict[str, bytes]:
    """Config and tokenizer files of a folder, by name."""
    return {name: (folder / name).read_bytes() for name in REST_FILES if (folder / name).is_file()}


# --- in -----------------------------------------------------------------------------------------------------------


@dataclass
class PublishedTensors:
    """A published PixelLM's tensors under our names, not read yet.

    tower: of the vision tower, where the file holds one. unused: under their own names, those our model has no place
    for. lora_layers: how many had LoRA, merged when they are read.
    """

    model: Stored
    tower: Stored
    unused: Stored
    lora_layers: int

    @property
    def ignored(self) -> dict[str, str]:
        """For the report."""
        return dict.fromkeys(self.unused, _KEPT)


def sort_published(place: str, tensors: Stored, lora_alpha: float) -> PublishedTensors:
    """A published PixelLM's tensors, sorted; BuildError that names one that no published PixelLM holds.

    lora_alpha: with which the LoRA among them, if there is any, was trained.
    """
    merged, layers = merged_lora(place, tensors, lora_alpha)
    tower = {name.removeprefix(TOWER_PREFIX): t for name, t in merged.items() if name.startswith(TOWER_PREFIX)}
    found, _, left_over = sort_out(tower, TOWER_NAMES, "")
    strange = [name for name, why in left_over.items() if not why]
    model: Stored = {}
    unused: Stored = {}
    for name, stored in merged.items():
        if name.startswith(TOWER_PREFIX):
            continue
        try:
            ours = name_from_pixellm(name)
        except ValueError as error:
            raise BuildError(f"{place}: {error}") from error
        if ours is None:
            unused[name] = stored
        else:
            model[ours] = stored
    if strange:
        raise BuildError(f"{place}: tensor {TOWER_PREFIX + strange[0]!r} does not belong to a vision tower")
    return PublishedTensors(model, found, unused, layers)


def merged_lora(place: str, tensors: Stored, lora_alpha: float) -> tuple[Stored, int]:
    """Tensors with the LoRA among them added when they are read, and to how many layers. BuildError for half a pair."""
    layers = [name.removesuffix(_LORA_A) for name in tensors if name.endswith(_LORA_A)]
    plain = {
        name.replace(".base_layer.", "."): stored
        for name, stored in tensors.items()
        if not name.endswith((_LORA_A, _LORA_B))
    }
    for layer in layers:
        name = f"{layer}.weight"
        if name not in plain or layer + _LORA_B not in tensors:
            absent = name if name not in plain else layer + _LORA_B
            raise BuildError(f"{place}: tensor {absent!r} is missing, to which {layer + _LORA_A!r} belongs")
        low, high = tensors[layer + _LORA_A], tensors[layer + _LORA_B]
        plain[name] = _with_lora(plain[name], low, high, lora_alpha / low.shape[0])
    return plain, len(layers)


def _with_lora(base: StoredTensor, low: StoredTensor, high: StoredTensor, scale: float) -> StoredTensor:
    def add(weight: torch.Tensor) -> torch.Tensor:
        change = scale * (high.read().float() @ low.read().float())
        return (weight.float() + change).to(weight.dtype)

    return base.made(base.shape, add)


def lora_alpha_in(folder: Path) -> float:
    """The alpha of the LoRA in a folder: what PEFT wrote beside it, else the release's."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError):
        return RELEASE_LORA_ALPHA
    return float(found)


def prepare_release_tokenizer(tokenizer: Any, rows: int, wanted: int | None, place: str) -> int:
    """Add what a published PixelLM's tokenizer lacks.

    Args:
        rows: of its embedding table. wanted: tokens per scale that were asked for; None takes what is there.

    Returns:
        Tokens per scale: of the seg tokens that are there, else the release's.

    Raises:
        BuildError: the tokenizer does not belong to that table, or its seg tokens are not what was asked for.
    """
    vocabulary = tokenizer.get_vocab()
    count = 0
    while f"[SEG{count}]" in vocabulary:
        count += 1
    if count % RELEASE_NUM_SCALES:
        raise BuildError(
            f"{place}: its tokenizer holds {count} seg tokens: expected as many for each of the release's "
            f"{RELEASE_NUM_SCALES} scales"
        )
    per_scale = count // RELEASE_NUM_SCALES or wanted or RELEASE_TOKENS_PER_SCALE
    if wanted is not None and wanted != per_scale:
        raise BuildError(
            f"{place}: its tokenizer holds {count} seg tokens, {per_scale} for each scale, but --seg_token_num is "
            f"{wanted}: leave that out"
        )
    PixelLMProcessor.prepare_tokenizer(tokenizer, RELEASE_NUM_SCALES, per_scale)
    needed = required_vocab_size(tokenizer)
    if needed > rows or (not count and needed != rows):
        raise BuildError(
            f"{place}: tensor {name_in_pixellm(TABLE)!r} has {rows} rows, but its tokenizer and the tokens of a "
            f"PixelLM are {needed}: they are not of one model, copy both from one place"
        )
    return per_scale


# --- out ----------------------------------------------------------------------------------------------------------


def differences_from_release(
    model: PixelLMForCausalLM, processor: PixelLMProcessor, rest: PublishedRest | None
) -> list[str]:
    """Every number in which a model differs from what the original code has fixed, "name: found, expected".

    rest: what was kept of the published folder it came from, whose config may have chosen some of them.
    """
    config, kept = model.config, _kept_config(rest)
    group = RELEASE_NUM_SCALES * config.tokens_per_scale
    settings: dict[str, tuple[Any, Any]] = {
        "language model": (config.text_config.model_type, "llama"),
        "vision tower": (config.vision_config.model_type, "clip_vision_model"),
        "num_scales": (config.num_scales, RELEASE_NUM_SCALES),
        "image_token_pool": (config.image_token_pool, RELEASE_IMAGE_TOKEN_POOL),
        "position_resize": (config.position_resize, "release"),
        "image_size": (config.image_size, kept.get("resize_vision_tower_size") or RELEASE_SIDE),
        "vision_feature_layers": (
            list(config.vision_feature_layers),
            [kept.get("mm_vision_select_layer", RELEASE_COARSE_LAYER), RELEASE_FINE_LAYER],
        ),
        "image_mean": (list(processor.image_mean), list(RELEASE_IMAGE_MEAN)),
        "image_std": (list(processor.image_std), list(RELEASE_IMAGE_STD)),
        "pad_before_normalize": (processor.pad_before_normalize, False),
        **{name: (getattr(config, name), value) for name, value in RELEASE_DECODER.items()},
    }
    found = [f"{name}: found {a}, expected {b}" for name, (a, b) in settings.items() if a != b]
    state = model.state_dict()
    for name, constant in zip(RELEASE_CONSTANTS, (1 / group, 1 / RELEASE_NUM_SCALES), strict=True):
        values = state[name].detach().reshape(-1)
        unlike = [float(value) for value in values if not _is_constant(value, constant)]
        if unlike:
            shown = ", ".join(f"{value:.6g}" for value in unlike)
            found.append(f"{name}: found {shown}, expected {constant:.6g}")
    return found


def _is_constant(value: torch.Tensor, constant: float) -> bool:
    """Whether a number is the release's, in any of the types in which a model may have been saved."""
    number = float(value)
    return any(
        number == float(torch.tensor(constant).to(kind)) for kind in (torch.float32, torch.bfloat16, torch.float16)
    )


def published_state(model: PixelLMForCausalLM, rest: PublishedRest | None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict that the original code reads.

    Returns:
        It, and the names of tensors that had to be made up because nothing was kept: no number depends on them.

    Raises:
        BuildError: the model has tensors that the published layout has no name for.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith(TOWER) or name in RELEASE_CONSTANTS:
            continue
        theirs = name_in_pixellm(name)
        if theirs is None:
            raise BuildError(f"tensor {name!r} has no name in the published layout: it cannot be written back")
        state[theirs] = value.detach()
    rows = _rows_without_placeholder(model.config, len(state[str(name_in_pixellm(TABLE))]))
    for table in (TABLE, "language_model.lm_head.weight"):
        name = str(name_in_pixellm(table))
        state[name] = state[name][:rows]
    kept = dict(rest.tensors) if rest is not None else {}
    needed = unused_shapes(model.config)
    made = [name for name in needed if name not in kept]
    kept |= {name: _made_up(name, shape, model.config) for name, shape in needed.items() if name in made}
    return state | kept, made


def _rows_without_placeholder(config: PixelLMConfig, rows: int) -> int:
    return rows - 1 if config.image_token_id == rows - 1 else rows


def unused_shapes(config: PixelLMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a published PixelLM that no number depends on."""
    text, width = config.text_config, config.embedding_dim
    prompt = "model.prompt_encoder."
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (head // 2,) for layer in range(text.num_hidden_layers)
    }
    shapes |= {f"{prompt}point_embeddings.{number}.weight": (1, width) for number in range(4)}
    shapes[f"{prompt}not_a_point_embed.weight"] = (1, width)
    for number, shape in ((0, (4, 1, 2, 2)), (1, (4,)), (3, (16, 4, 2, 2)), (4, (16,)), (6, (width, 16, 1, 1))):
        shapes[f"{prompt}mask_downscaling.{number}.weight"] = shape
        shapes[f"{prompt}mask_downscaling.{number}.bias"] = shape[:1]
    assert all(any(matches(pattern, name) is not None for pattern in PIXELLM_UNUSED) for name in shapes)
    return shapes


def _made_up(name: str, shape: tuple[int, ...], config: PixelLMConfig) -> torch.Tensor:
    """The rotary frequencies, which are known; zeros for the rest."""
    if not name.endswith("inv_freq"):
        return torch.zeros(shape)
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    base = float(rope.get("rope_theta", 10000.0))
    return 1.0 / base ** (torch.arange(shape[0], dtype=torch.float32) / shape[0])


def published_config(
    config: PixelLMConfig, processor: PixelLMProcessor, rest: PublishedRest | None, rows: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json the original code reads: the one that was kept, or one made from ours."""
    text = config.text_config.to_dict()
    rope = text.get("rope_parameters") or {}
    fields: dict[str, Any] = {
        "architectures": ["PixelLMForCausalLM"],
        "model_type": "llava",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": False,
        **{name: text[name] for name in TEXT_FIELDS if text.get(name) is not None},
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None,
        "image_feature_scale_num": config.num_scales,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_hidden_dim": 2,
        "mm_projector_out_dim": 1,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": processor.use_mm_start_end,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layers[0],
        "out_dim": config.embedding_dim,
        "pad_train_clip_images": True,
        "resize_vision_tower": True,
        "resize_vision_tower_size": config.image_size,
        "separate_mm_projector": True,
        "train_mask_decoder": True,
        "use_mm_proj": True,
        "vision_tower_for_mask": True,
    }
    return {**fields, **_kept_config(rest), "vocab_size": rows, "torch_dtype": fields["torch_dtype"]}


def _kept_config(rest: PublishedRest | None) -> dict[str, Any]:
    """The config.json that came with a published PixelLM; {} for a model that did not come from one."""
    return json.loads(rest.files["config.json"]) if rest is not None and "config.json" in rest.files else {}

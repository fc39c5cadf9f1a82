"""A model of ours written as the original code reads it: names, config, and the numbers in which they differ."""

import json
from typing import Any

import torch

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor
from utils.checkpoints.folders import BuildError
from utils.checkpoints.layouts.layout import TOKEN_TABLE
from utils.checkpoints.layouts.names import has_names
from utils.checkpoints.layouts.published_names import (
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
    TEXT_FIELDS,
    name_in_pixellm,
)
from utils.checkpoints.layouts.towers import TOWER
from utils.checkpoints.published_extras import PublishedExtras


def find_differences(
    model: PixelLMForCausalLM, processor: PixelLMProcessor, extras: PublishedExtras | None
) -> list[str]:
    """Every number in which a model differs from what the original code has fixed, "name: found, expected".

    extras: what was kept of the published folder it came from, whose config may have chosen some of them.
    """
    config, kept = model.config, _kept_config(extras)
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


def published_state(
    model: PixelLMForCausalLM, extras: PublishedExtras | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
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
    rows = _rows_without_placeholder(model.config, len(state[str(name_in_pixellm(TOKEN_TABLE))]))
    for table in (TOKEN_TABLE, "language_model.lm_head.weight"):
        name = str(name_in_pixellm(table))
        state[name] = state[name][:rows]
    kept = dict(extras.tensors) if extras is not None else {}
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
    assert all(any(has_names([name], pattern) for pattern in PIXELLM_UNUSED) for name in shapes)
    return shapes


def _made_up(name: str, shape: tuple[int, ...], config: PixelLMConfig) -> torch.Tensor:
    """The rotary frequencies, which are known; zeros for the rest."""
    if not name.endswith("inv_freq"):
        return torch.zeros(shape)
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    base = float(rope.get("rope_theta", 10000.0))
    return 1.0 / base ** (torch.arange(shape[0], dtype=torch.float32) / shape[0])


def published_config(
    config: PixelLMConfig, processor: PixelLMProcessor, extras: PublishedExtras | None, rows: int, dtype: torch.dtype
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
    return {**fields, **_kept_config(extras), "vocab_size": rows, "torch_dtype": fields["torch_dtype"]}


def _kept_config(extras: PublishedExtras | None) -> dict[str, Any]:
    """The config.json that came with a published PixelLM; {} for a model that did not come from one."""
    return json.loads(extras.files["config.json"]) if extras is not None and "config.json" in extras.files else {}

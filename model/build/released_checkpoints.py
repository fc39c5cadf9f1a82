"""Layouts others published: which of their tensors is which of ours, and which numerics they need.

So far the released PixelLM (facts M, golden set): its state dict without vision tower, and a stand-alone CLIP tower.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig

from ..configuration_pixellm import PixelLMConfig
from ..vision_tower import resize_position_table

# Fixed inside the release's code, whatever its config says (facts M2, M5).
RELEASE_NUM_SCALES = 2
RELEASE_FINE_LAYER = -11
RELEASE_IMAGE_TOKEN_POOL = 2
RELEASE_DECODER = {"decoder_depth": 2, "decoder_num_heads": 8, "decoder_mlp_dim": 2048, "decoder_num_mask_tokens": 4}

# The release normalises its pictures with SAM's statistics, per channel in units of 0..255, and pads with zeros after
# that (fact P1).
RELEASE_IMAGE_MEAN = (123.675, 116.28, 103.53)
RELEASE_IMAGE_STD = (58.395, 57.12, 57.375)

# Fields of a published config that mean the same in a Llama config of transformers.
LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

# Published name -> ours, first match wins; None: in the file, but no number of the model depends on it.
PIXELLM_NAMES: tuple[tuple[str, str | None], ...] = (
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),
    (r"(model\.(?:embed_tokens|norm|layers)\..*|lm_head\.weight)", r"language_model.\1"),
    (r"model\.mm_projector\.(.*)", r"projector.layers.\1"),
    (r"model\.out_mm_projector\.(.*)", r"mask_projector.layers.\1"),
    (r"model\.text_hidden_fcs\.0\.(.*)", r"codebook.layers.\1"),
    (r"model\.image_feature_neck\.(.*)", r"pixel_decoder.neck.\1"),
    (r"model\.prompt_encoder\.no_mask_embed\.(.*)", r"pixel_decoder.no_mask_embed.\1"),
    (r"model\.prompt_encoder\.(?:point_embeddings|not_a_point_embed|mask_downscaling)\..*", None),
    (r"model\.prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", r"pixel_decoder.positions.0.frequencies"),
    (r"model\.mask_decoder\.pe(\d+)\.positional_encoding_gaussian_matrix", r"pixel_decoder.positions.\1.frequencies"),
    (
        r"model\.mask_decoder\.transformer\.(\d+\.layers\.\d+\.mlp)\.lin1\.(.*)",
        r"pixel_decoder.transformers.\1.layers.0.\2",
    ),
    (
        r"model\.mask_decoder\.transformer\.(\d+\.layers\.\d+\.mlp)\.lin2\.(.*)",
        r"pixel_decoder.transformers.\1.layers.1.\2",
    ),
    (r"model\.mask_decoder\.transformer\.(.*)", r"pixel_decoder.transformers.\1"),
    (r"model\.mask_decoder\.(iou_token|mask_tokens|level_embed|output_upscaling)\.(.*)", r"pixel_decoder.\1.\2"),
    (r"model\.mask_decoder\.upsample_2x\.(.*)", r"pixel_decoder.map_upscaling.\1"),
    (r"model\.mask_decoder\.output_hypernetworks_mlps\.(.*)", r"pixel_decoder.hypernetworks.\1"),
    (r"model\.mask_decoder\.iou_prediction_head\.(.*)", r"pixel_decoder.iou_head.\1"),
)
CLIP_NAMES: tuple[tuple[str, str | None], ...] = (
    (r"vision_model\.embeddings\.position_ids", None),
    (r"vision_model\.(.*)", r"vision_tower.model.\1"),
)
CLIP_POSITION_TABLE = "vision_model.embeddings.position_embedding.weight"
CLIP_CLASS_TOKENS = 1


def _translate(name: str, names: Sequence[tuple[str, str | None]], layout: str) -> str | None:
    for pattern, ours in names:
        found = re.fullmatch(pattern, name)
        if found:
            return None if ours is None else found.expand(ours)
    raise ValueError(f"tensor {name!r} does not belong to {layout}; check that the checkpoint is one")


def name_from_pixellm(published: str) -> str | None:
    """Our name of a tensor of a published PixelLM; None if nothing depends on it (rotary tables, point prompts).

    Raises ValueError for a name that no published PixelLM holds.
    """
    return _translate(published, PIXELLM_NAMES, "a published PixelLM")


def name_from_clip(published: str) -> str | None:
    """Our name of a tensor of a stand-alone CLIP vision tower; None for its table of position numbers.

    Raises ValueError for a name that no such tower holds.
    """
    return _translate(published, CLIP_NAMES, "a stand-alone CLIP vision tower")


def _renamed(tensors: Mapping[str, torch.Tensor], translate: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    named = ((translate(name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def state_dict_from_release(
    pixellm: Mapping[str, torch.Tensor], clip: Mapping[str, torch.Tensor], config: PixelLMConfig
) -> dict[str, torch.Tensor]:
    """Our state dict from a published PixelLM and the CLIP tower it was trained over.

    Args:
        pixellm: published names -> tensors. clip: names of a stand-alone tower -> tensors, the position table still at
            the tower's own resolution; it is brought to `config`'s grid as `config.position_resize` says.

    Returns:
        Every parameter and buffer of our model, save fusion weights that are constants of the config.
    """
    clip = dict(clip)
    clip[CLIP_POSITION_TABLE] = resize_position_table(
        clip[CLIP_POSITION_TABLE], config.grid_size, CLIP_CLASS_TOKENS, config.position_resize
    )
    return {**_renamed(pixellm, name_from_pixellm), **_renamed(clip, name_from_clip)}


def config_from_release(
    published: Mapping[str, Any],
    clip_dims: Mapping[str, Any],
    *,
    seg_token_ids: Sequence[int],
    image_token_id: int,
    **overrides: Any,
) -> PixelLMConfig:
    """The config with which a published PixelLM gives its published numbers.

    Args:
        published: content of its config.json.
        clip_dims: config of its CLIP vision tower, at the tower's own resolution.
        seg_token_ids: ids of its seg tokens in order; the release saves neither them nor their number (fact M2).
        image_token_id: id that stands for the picture in our inputs; it is never embedded.
        overrides: fields of PixelLMConfig to set otherwise, such as `refinement_alpha`.
    """
    side = published["resize_vision_tower_size"]
    group = len(seg_token_ids)
    if group == 0 or group % RELEASE_NUM_SCALES:
        raise ValueError(
            f"{group} seg token ids were given; expected the same number for each of the release's "
            f"{RELEASE_NUM_SCALES} scales"
        )
    text = {field: published[field] for field in LLAMA_FIELDS if published.get(field) is not None}
    vision = {**clip_dims, "image_size": side}
    fields: dict[str, Any] = {
        "text_config": AutoConfig.for_model("llama", **text),
        "vision_config": AutoConfig.for_model("clip_vision_model", **vision),
        "image_size": side,
        "vision_feature_layers": [published["mm_vision_select_layer"], RELEASE_FINE_LAYER],
        "image_token_pool": RELEASE_IMAGE_TOKEN_POOL,
        "num_scales": RELEASE_NUM_SCALES,
        "tokens_per_scale": group // RELEASE_NUM_SCALES,
        "seg_token_ids": list(seg_token_ids),
        "image_token_id": image_token_id,
        "embedding_dim": published["out_dim"],
        **RELEASE_DECODER,
        "token_fusion": "constant",
        "token_fusion_value": 1 / group,  # of all seg tokens, not of those of a scale (fact M1)
        "scale_fusion": "constant",
        "scale_fusion_value": 1 / RELEASE_NUM_SCALES,
        "position_resize": "release",
    }
    return PixelLMConfig(**{**fields, **overrides})

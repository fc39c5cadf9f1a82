"""The released PixelLM (docs/facts.md, M): which of its tensors is which of ours, and which numerics it needs.

What it holds: its state dict without vision tower. Beside it stands a CLIP tower of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from model.configuration_pixellm import PixelLMConfig
from utils.checkpoints.layouts.names import match_name, translate_name

# Fixed inside the release's code, whatever its config says (docs/facts.md, M2, M5).
RELEASE_NUM_SCALES = 2
RELEASE_FINE_LAYER = -11
RELEASE_IMAGE_TOKEN_POOL = 2
RELEASE_DECODER = {"decoder_depth": 2, "decoder_num_heads": 8, "decoder_mlp_dim": 2048, "decoder_num_mask_tokens": 4}

# The release normalises its images with SAM's statistics, per channel in units of 0..255, and pads with zeros after
# that (docs/facts.md, P1).
RELEASE_IMAGE_MEAN = (123.675, 116.28, 103.53)
RELEASE_IMAGE_STD = (58.395, 57.12, 57.375)

# What its own constructor sets where a config leaves it out.
RELEASE_SIDE, RELEASE_COARSE_LAYER, RELEASE_EMBEDDING_DIM, RELEASE_TOKENS_PER_SCALE = 448, -2, 256, 3

# Fields of a published config that mean the same in a config of transformers' Llama (Mistral, Qwen2).
TEXT_FIELDS = (
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
    "head_dim",
    "attention_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
)

# Published name <-> ours, first match wins in both directions; {} is a number, * what follows.
PIXELLM_NAMES: tuple[tuple[str, str], ...] = (
    ("model.embed_tokens.*", "language_model.model.embed_tokens.*"),
    ("model.norm.*", "language_model.model.norm.*"),
    ("model.layers.*", "language_model.model.layers.*"),
    ("lm_head.weight", "language_model.lm_head.weight"),
    ("model.mm_projector.*", "projector.layers.*"),
    ("model.out_mm_projector.*", "mask_projector.layers.*"),
    ("model.text_hidden_fcs.0.*", "codebook.layers.*"),
    ("model.image_feature_neck.*", "pixel_decoder.neck.*"),
    ("model.prompt_encoder.no_mask_embed.*", "pixel_decoder.no_mask_embed.*"),
    ("model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "pixel_decoder.positions.0.frequencies"),
    ("model.mask_decoder.pe{}.positional_encoding_gaussian_matrix", "pixel_decoder.positions.{}.frequencies"),
    (
        "model.mask_decoder.transformer.{}.layers.{}.mlp.lin1.*",
        "pixel_decoder.transformers.{}.layers.{}.mlp.layers.0.*",
    ),
    (
        "model.mask_decoder.transformer.{}.layers.{}.mlp.lin2.*",
        "pixel_decoder.transformers.{}.layers.{}.mlp.layers.1.*",
    ),
    ("model.mask_decoder.transformer.*", "pixel_decoder.transformers.*"),
    ("model.mask_decoder.iou_token.*", "pixel_decoder.iou_token.*"),
    ("model.mask_decoder.mask_tokens.*", "pixel_decoder.mask_tokens.*"),
    ("model.mask_decoder.level_embed.*", "pixel_decoder.level_embed.*"),
    ("model.mask_decoder.output_upscaling.*", "pixel_decoder.output_upscaling.*"),
    ("model.mask_decoder.upsample_2x.*", "pixel_decoder.map_upscaling.*"),
    ("model.mask_decoder.output_hypernetworks_mlps.*", "pixel_decoder.hypernetworks.*"),
    ("model.mask_decoder.iou_prediction_head.*", "pixel_decoder.iou_head.*"),
)
# In the file, but no number of the model depends on them: rotary tables, and prompts of points and masks.
PIXELLM_UNUSED = (
    "model.layers.{}.self_attn.rotary_emb.inv_freq",
    "model.prompt_encoder.point_embeddings.*",
    "model.prompt_encoder.not_a_point_embed.*",
    "model.prompt_encoder.mask_downscaling.*",
)
# Of ours, what the release has as numbers in its code.
RELEASE_CONSTANTS = ("codebook.token_weights", "pixel_decoder.scale_weights")


def name_from_pixellm(published: str) -> str | None:
    """Our name of a tensor of a published PixelLM; None if nothing depends on it (rotary tables, point prompts).

    Raises ValueError for a name that no published PixelLM holds.
    """
    if any(match_name(pattern, published) is not None for pattern in PIXELLM_UNUSED):
        return None
    found = translate_name(published, PIXELLM_NAMES)
    if found is None:
        raise ValueError(
            f"tensor {published!r} does not belong to a published PixelLM; check that the checkpoint is one"
        )
    return found


def name_in_pixellm(own: str) -> str | None:
    """The name a published PixelLM has for one of our tensors; None for what it does not hold."""
    return translate_name(own, [(ours, theirs) for theirs, ours in PIXELLM_NAMES])


def text_config(kind: str, published: Mapping[str, Any]) -> PretrainedConfig:
    """The language model's own config in the config.json of a model that was made around it."""
    return AutoConfig.for_model(
        kind, **{field: published[field] for field in TEXT_FIELDS if published.get(field) is not None}
    )


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
        seg_token_ids: ids of its seg tokens in order; the release saves neither (docs/facts.md, M2).
        image_token_id: id that stands for the image in our inputs; it is never embedded.
        overrides: fields of PixelLMConfig to set otherwise, such as `refinement_alpha`.
    """
    side = published.get("resize_vision_tower_size") or RELEASE_SIDE
    group = len(seg_token_ids)
    if group == 0 or group % RELEASE_NUM_SCALES:
        raise ValueError(
            f"{group} seg token ids were given; expected the same number for each of the release's "
            f"{RELEASE_NUM_SCALES} scales"
        )
    vision = {**clip_dims, "image_size": side}
    fields: dict[str, Any] = {
        "text_config": text_config("llama", published),
        "vision_config": AutoConfig.for_model("clip_vision_model", **vision),
        "image_size": side,
        "vision_feature_layers": [
            published.get("mm_vision_select_layer", RELEASE_COARSE_LAYER),
            RELEASE_FINE_LAYER,
        ],
        "image_token_pool": RELEASE_IMAGE_TOKEN_POOL,
        "num_scales": RELEASE_NUM_SCALES,
        "tokens_per_scale": group // RELEASE_NUM_SCALES,
        "seg_token_ids": list(seg_token_ids),
        "image_token_id": image_token_id,
        "embedding_dim": published.get("out_dim") or RELEASE_EMBEDDING_DIM,
        **RELEASE_DECODER,
        "token_fusion": "constant",
        "token_fusion_value": 1 / group,  # of all seg tokens, not of those of a scale (docs/facts.md, M1)
        "scale_fusion": "constant",
        "scale_fusion_value": 1 / RELEASE_NUM_SCALES,
        "position_resize": "release",
        "group_rule": "release",
    }
    return PixelLMConfig(**{**fields, **overrides})

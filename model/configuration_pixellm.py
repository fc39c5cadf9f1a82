"""Every number that shapes a weight or a result of PixelLM, and what is derived from them."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

TOKEN_FUSIONS = ("learned", "constant")
POSITION_RESIZES = ("standard", "release")
GROUP_RULES = ("adjacent", "release")


def _sub_config(value: PretrainedConfig | dict[str, Any] | None, default_type: str) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    fields = dict(value or {})
    return AutoConfig.for_model(fields.pop("model_type", default_type), **fields)


class PixelLMConfig(PretrainedConfig):
    """Shapes and numerics of a PixelLM.

    Parts:
        text_config: the language model's own config. vision_config: the vision tower's own config, whose `image_size`
            is that of the enlarged position table.
        image_size: side in pixels of the square an image is put into.
        vision_feature_layers: one hidden state of the tower per scale, scale 0 (coarse) first, counted like
            `hidden_states` of transformers. The language model sees the one of scale 0.
        image_token_pool: side of the square of patches averaged into one image token.
        num_scales (S), tokens_per_scale (K): a seg group is S * K adjacent tokens.
        seg_token_ids: their ids in order. image_token_id: id of the placeholder that an image's positions replace.
        embedding_dim: width of codebook embeddings and of the pixel decoder.
        decoder_depth, decoder_num_heads, decoder_mlp_dim, decoder_num_mask_tokens: the two-way transformers.

    Numerics (the release's values are what a published checkpoint is loaded with):
        token_fusion: "learned" (paper) or "constant" (release) weights over the K tokens of a scale, starting at or
            being `token_fusion_value` (default 1 / K; release: 1 / 6).
        scale_fusion, scale_fusion_value: the same for the S masks of a target (default 1 / S).
        position_resize: how the tower's position table was enlarged: "standard" or "release" (docs/facts.md, M6).
        group_rule: which seg tokens make a group. "adjacent": S * K that stand side by side; what is broken in an
            answer is left out alone. "release" (docs/facts.md, M3, E3): any S * K of a text in order, those of a prompt
            included when an answer is generated; a number that is no multiple costs all masks of that answer.

    Losses:
        ce_loss_weight, bce_loss_weight, dice_loss_weight; refinement_alpha: weight of a pixel in the BCE where two or
            more masks predicted for one question are positive (1 switches target refinement off).
    """

    model_type = "pixellm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        image_size: int = 448,
        vision_feature_layers: tuple[int, ...] | list[int] = (-2, -11),
        image_token_pool: int = 2,
        num_scales: int = 2,
        tokens_per_scale: int = 3,
        seg_token_ids: tuple[int, ...] | list[int] = (),
        image_token_id: int = -1,
        embedding_dim: int = 256,
        decoder_depth: int = 2,
        decoder_num_heads: int = 8,
        decoder_mlp_dim: int = 2048,
        decoder_num_mask_tokens: int = 4,
        token_fusion: str = "learned",
        token_fusion_value: float | None = None,
        scale_fusion: str = "learned",
        scale_fusion_value: float | None = None,
        position_resize: str = "standard",
        group_rule: str = "adjacent",
        ce_loss_weight: float = 1.0,
        bce_loss_weight: float = 2.0,
        dice_loss_weight: float = 0.5,
        refinement_alpha: float = 2.0,
        **kwargs: Any,  # transformers' own fields: dtype, architectures, auto_map …
    ) -> None:
        self.text_config = _sub_config(text_config, "llama")
        self.vision_config = _sub_config(vision_config, "clip_vision_model")
        self.image_size = image_size
        self.vision_feature_layers = list(vision_feature_layers)
        self.image_token_pool = image_token_pool
        self.num_scales = num_scales
        self.tokens_per_scale = tokens_per_scale
        self.seg_token_ids = list(seg_token_ids)
        self.image_token_id = image_token_id
        self.embedding_dim = embedding_dim
        self.decoder_depth = decoder_depth
        self.decoder_num_heads = decoder_num_heads
        self.decoder_mlp_dim = decoder_mlp_dim
        self.decoder_num_mask_tokens = decoder_num_mask_tokens
        self.token_fusion = token_fusion
        self.token_fusion_value = 1.0 / tokens_per_scale if token_fusion_value is None else token_fusion_value
        self.scale_fusion = scale_fusion
        self.scale_fusion_value = 1.0 / num_scales if scale_fusion_value is None else scale_fusion_value
        self.position_resize = position_resize
        self.group_rule = group_rule
        self.ce_loss_weight = ce_loss_weight
        self.bce_loss_weight = bce_loss_weight
        self.dice_loss_weight = dice_loss_weight
        self.refinement_alpha = refinement_alpha
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        problems = []
        if self.token_fusion not in TOKEN_FUSIONS or self.scale_fusion not in TOKEN_FUSIONS:
            problems.append(f"token_fusion and scale_fusion must be one of {TOKEN_FUSIONS}")
        if self.position_resize not in POSITION_RESIZES:
            problems.append(f"position_resize must be one of {POSITION_RESIZES}, found {self.position_resize!r}")
        if self.group_rule not in GROUP_RULES:
            problems.append(f"group_rule must be one of {GROUP_RULES}, found {self.group_rule!r}")
        if len(self.vision_feature_layers) != self.num_scales:
            problems.append(
                f"vision_feature_layers must name one layer per scale ({self.num_scales}), found "
                f"{self.vision_feature_layers}"
            )
        if self.seg_token_ids and len(self.seg_token_ids) != self.group_size:
            problems.append(f"seg_token_ids must hold {self.group_size} ids, found {len(self.seg_token_ids)}")
        if self.image_size % self.patch_size or self.grid_size % self.image_token_pool:
            problems.append(
                f"image_size {self.image_size} must be a multiple of patch size x image_token_pool "
                f"({self.patch_size} x {self.image_token_pool})"
            )
        if self.embedding_dim % (2 * self.decoder_num_heads) or self.embedding_dim % 8:
            problems.append(
                f"embedding_dim {self.embedding_dim} must be a multiple of 8 and of 2 x decoder_num_heads "
                f"({self.decoder_num_heads})"
            )
        if self.refinement_alpha < 1:
            problems.append(f"refinement_alpha must be at least 1 (1 is off), found {self.refinement_alpha}")
        if problems:
            raise ValueError("PixelLMConfig: " + "; ".join(problems))

    @property
    def patch_size(self) -> int:
        """Side of a patch of the vision tower, in pixels."""
        return self.vision_config.patch_size

    @property
    def grid_size(self) -> int:
        """Patches per side of the square."""
        return self.image_size // self.patch_size

    @property
    def image_token_grid(self) -> int:
        """Image tokens per side of the square."""
        return self.grid_size // self.image_token_pool

    @property
    def num_image_tokens(self) -> int:
        """Positions an image takes in the language model."""
        return self.image_token_grid**2

    @property
    def group_size(self) -> int:
        """Tokens of a seg group: scales x tokens per scale."""
        return self.num_scales * self.tokens_per_scale

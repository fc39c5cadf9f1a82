"""What may be chosen when a model is built, and what comes of it."""

import inspect
from dataclasses import asdict, dataclass
from typing import Any

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor
from utils.checkpoints.load_report import LoadReport
from utils.checkpoints.published_extras import PublishedExtras

# What only masks need; a base that only ever learned words lacks it.
MASK_PARTS = ("mask_projector", "codebook", "pixel_decoder")
NEW_PARTS = ("projector", *MASK_PARTS)


@dataclass
class ModelOptions:
    """What may be chosen when a model is built.

    None keeps what a PixelLM folder says, or takes the field's default for a new one.

    The fields that `PixelLMConfig` or `PixelLMProcessor` have too mean the same as there. learn_fusion: the fusion
    weights that a release holds constant are learned, unless token_fusion and scale_fusion say otherwise.
    """

    image_size: int | None = None
    image_token_pool: int | None = None
    vision_feature_layers: list[int] | None = None
    num_scales: int | None = None
    tokens_per_scale: int | None = None
    embedding_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    decoder_mlp_dim: int | None = None
    token_fusion: str | None = None
    scale_fusion: str | None = None
    group_rule: str | None = None
    refinement_alpha: float | None = None
    ce_loss_weight: float | None = None
    bce_loss_weight: float | None = None
    dice_loss_weight: float | None = None
    conversation_format: str | None = None
    use_mm_start_end: bool | None = None
    model_max_length: int | None = None
    text_rules: str | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    pad_before_normalize: bool | None = None
    learn_fusion: bool = False

    def chosen(self, owner: type) -> dict[str, Any]:
        """The options that were set and that `owner`'s constructor takes."""
        names = set(inspect.signature(owner).parameters)
        return {name: value for name, value in asdict(self).items() if value is not None and name in names}


@dataclass
class BuiltModel:
    """A model in evaluation mode, the processor that belongs to it, and where the weights came from.

    published: what a published PixelLM held beside them, to be saved with the model; None for any other.
    """

    model: PixelLMForCausalLM
    processor: PixelLMProcessor
    report: LoadReport
    published: PublishedExtras | None = None


def make_fusion_learned(config: PixelLMConfig, options: ModelOptions) -> None:
    """Learn what a release holds constant, from its constants on, where the options ask for that."""
    if options.learn_fusion and config.position_resize == "release":  # the mark of the release's numerics
        config.token_fusion = options.token_fusion or "learned"
        config.scale_fusion = options.scale_fusion or "learned"


def token_ids(processor: PixelLMProcessor) -> dict[str, Any]:
    """The fields of `PixelLMConfig` that the tokenizer decides."""
    return {"seg_token_ids": list(processor.seg_token_ids), "image_token_id": processor.image_token_id}

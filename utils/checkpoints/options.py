"""What a model is built by, and what comes of it: options, the manner of building, the finished model."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor
from utils.checkpoints.load_report import LoadReport
from utils.checkpoints.published import PublishedRest
from utils.checkpoints.tensor_files import Stored
from utils.checkpoints.weight_loading import Origin, Settle, empty_model, fill

# What only masks need; a base that only ever learned words lacks it.
MASK_PARTS = ("mask_projector", "codebook", "pixel_decoder")
NEW_PARTS = ("projector", *MASK_PARTS)
NEW_ROWS = "rows of the added tokens are drawn around the mean of the others"


@dataclass
class ModelOptions:
    """What may be chosen when a model is built.

    None keeps what a PixelLM folder says, or takes the field's default for a new one.

    The fields that `PixelLMConfig` or `PixelLMProcessor` have too mean the same as there.
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
    published: PublishedRest | None = None


@dataclass(frozen=True)
class Manner:
    """How a model is built, whatever it is built from; the fields are those of `builder.build_model`."""

    dtype: torch.dtype | None
    attn_implementation: str
    load_weights: bool
    to_train: bool
    settle: Settle | None = None


def finish(
    config: PixelLMConfig,
    processor: PixelLMProcessor,
    tensors: Stored,
    origins: list[Origin],
    may_lack: Mapping[str, str],
    manner: Manner,
    rows: int,
) -> BuiltModel:
    """The model of a config, filled. rows: of the stored embedding table."""
    if not manner.load_weights:
        config._attn_implementation = manner.attn_implementation
        model = PixelLMForCausalLM(config).to(manner.dtype or torch.float32)
        return BuiltModel(model, processor, LoadReport())
    model = empty_model(config, manner.attn_implementation)
    report = fill(model, tensors, origins, dtype=manner.dtype, may_lack=may_lack, rows=rows, settle=manner.settle)
    if model.get_input_embeddings().num_embeddings > rows:
        report.fresh["language_model.embeddings"] = NEW_ROWS
    if manner.to_train:
        # Random Fourier features lose what they are for in 16 bits, whatever type they were saved in.
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
    return BuiltModel(model, processor, report)


def learn_fusion(config: PixelLMConfig, options: ModelOptions) -> None:
    """What the release holds constant is learned in the paper's recipe, and starts at the release's constants."""
    if config.position_resize == "release":  # the mark of the release's numerics
        config.token_fusion = options.token_fusion or "learned"
        config.scale_fusion = options.scale_fusion or "learned"


def token_ids(processor: PixelLMProcessor) -> dict[str, Any]:
    """The fields of `PixelLMConfig` that the tokenizer decides."""
    return {"seg_token_ids": list(processor.seg_token_ids), "image_token_id": processor.image_token_id}

"""A new PixelLM around a language model and a tower of others."""

import inspect
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from model.configuration_pixellm import PixelLMConfig
from model.processing_pixellm import PixelLMProcessor
from utils.checkpoints.folders import BuildError, load_tokenizer
from utils.checkpoints.layouts.layout import TOKEN_TABLE, ModelSource, Part
from utils.checkpoints.layouts.towers import resize_tower
from utils.checkpoints.options import ModelOptions, token_ids
from utils.checkpoints.tensor_files import StoredTensors
from utils.checkpoints.weight_loading import Origin

NEW = "new in a PixelLM, initialised"


def assemble(
    folder: Path,
    layout: str,
    language: Part,
    tower: Part,
    projector: StoredTensors,
    allow_missing: dict[str, str],
    options: ModelOptions,
) -> ModelSource:
    """What a new PixelLM is built from.

    Args:
        folder: of the language model's tokenizer. layout, allow_missing: as in `ModelSource`.
    """
    vision_config, tower_tensors = resize_tower(tower, options.image_size or tower.config.image_size, "standard")
    tokenizer = load_tokenizer(folder)
    rows = language.config.vocab_size
    if len(tokenizer) > rows:
        name = language.origin.theirs(TOKEN_TABLE)
        raise BuildError(
            f"{language.origin.place}: tensor {name!r} has {rows} rows, but the tokenizer beside it {len(tokenizer)} "
            "tokens: they are not of one model, copy both from one place"
        )
    processor, fields = new_processor(tokenizer, vision_config, options)
    language.config.vocab_size = max(rows, len(tokenizer))
    return ModelSource(
        PixelLMConfig(text_config=language.config, vision_config=vision_config, **fields),
        processor,
        {**language.tensors, **tower_tensors, **projector},
        [language.origin, tower.origin, Origin("", str(folder))],
        rows,
        allow_missing,
        layout,
        {**language.ignored, **tower.ignored},
    )


def new_processor(
    tokenizer: Any, vision_config: PretrainedConfig, options: ModelOptions
) -> tuple[PixelLMProcessor, dict[str, Any]]:
    """The processor of a new PixelLM, and the fields of its config beside those of its parts."""
    defaults = inspect.signature(PixelLMConfig).parameters
    counts = {name: defaults[name].default for name in ("num_scales", "tokens_per_scale")}
    chosen = {**counts, **options.chosen(PixelLMConfig), "image_size": vision_config.image_size}
    chosen.update(_grid_defaults(options, vision_config, chosen["num_scales"]))
    shared = ("image_size", "image_token_pool", "num_scales", "tokens_per_scale")
    PixelLMProcessor.prepare_tokenizer(tokenizer, chosen["num_scales"], chosen["tokens_per_scale"])
    settings = options.chosen(PixelLMProcessor) | {name: chosen[name] for name in shared}
    processor = PixelLMProcessor(tokenizer, **{**settings, "patch_size": vision_config.patch_size})
    return processor, {**chosen, **token_ids(processor)}


def _grid_defaults(options: ModelOptions, vision_config: PretrainedConfig, num_scales: int) -> dict[str, Any]:
    """Pool and layers that fit a tower: the release's where they can be, else the nearest that can."""
    grid = vision_config.image_size // vision_config.patch_size
    pool = options.image_token_pool or (2 if grid % 2 == 0 else 1)
    layers = options.vision_feature_layers
    if layers is None:
        depth = vision_config.num_hidden_layers
        last, step = -2, 9  # the release reads hidden states -2 and -11 of 24 layers
        layers = [max(last - scale * step, -depth) for scale in range(num_scales)]
    return {"image_token_pool": pool, "vision_feature_layers": layers}

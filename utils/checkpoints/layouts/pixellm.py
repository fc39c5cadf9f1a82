"""A PixelLM saved here: to train on, to enlarge, or to export again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.configuration_pixellm import PixelLMConfig
from model.processing_pixellm import PixelLMProcessor, required_vocab_size
from utils.checkpoints.folders import BuildError, first_sentence, read_config
from utils.checkpoints.layouts.layout import Checkpoint, Layout, ModelSource
from utils.checkpoints.layouts.towers import fit_position_table
from utils.checkpoints.options import MASK_PARTS, ModelOptions, make_fusion_learned, token_ids
from utils.checkpoints.published_extras import PublishedExtras
from utils.checkpoints.tensor_files import StoredTensors
from utils.checkpoints.weight_loading import MISMATCH, Origin


class PixelLM(Layout):
    """Our own folders. Without weights they are read too, for callers that have the weights elsewhere."""

    title = "a PixelLM saved here"
    expected_names = (
        "language_model.model.embed_tokens.weight",
        "vision_tower.model.embeddings.patch_embedding.weight",
        "projector.layers.0.weight",
        "mask_projector.layers.0.weight",
        "codebook.layers.0.weight",
        "pixel_decoder.level_embed.weight",
    )

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return config.get("model_type") == PixelLMConfig.model_type

    def read(self, checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions) -> ModelSource:
        folder = checkpoint.folder
        saved = read_config(folder, "--version")
        assert isinstance(saved, PixelLMConfig)
        processor = change_processor(load_processor(folder, saved), options)
        rows = saved.text_config.vocab_size
        config = change_config(saved, processor, options)
        config.text_config.vocab_size = max(rows, required_vocab_size(processor.tokenizer))
        make_fusion_learned(config, options)
        absent = [part for part in MASK_PARTS if not any(name.startswith(f"{part}.") for name in checkpoint.tensors)]
        return ModelSource(
            config,
            processor,
            fit_position_table(checkpoint.tensors, config.grid_size, config.position_resize),
            [Origin("", str(folder), advice=MISMATCH)],
            rows,
            dict.fromkeys(absent, f"not in {folder}, initialised"),
            self.title,
            {"--vision-tower": f"{folder} is a PixelLM, which has its own"} if vision_tower else {},
            published=PublishedExtras.load(folder),
        )

    def language_tensors(self, checkpoint: Checkpoint) -> StoredTensors:
        return checkpoint.tensors


def load_processor(folder: Path, saved: PixelLMConfig) -> PixelLMProcessor:
    """The processor of a PixelLM folder; BuildError where it is not the one that belongs to the model."""
    path = folder / "processor_config.json"
    if not path.is_file():
        raise BuildError(f"{path} is missing: the folder must hold the processor that was saved with the model")
    try:
        processor = PixelLMProcessor.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise BuildError(f"the processor in {folder} cannot be read: {first_sentence(error)}") from error
    shared = ("image_size", "patch_size", "image_token_pool", "num_scales", "tokens_per_scale")
    for name in (*shared, "seg_token_ids", "image_token_id"):
        found, expected = getattr(processor, name), getattr(saved, name)
        if found != expected:
            raise BuildError(
                f"{folder}: the processor's {name} is {found}, the model's {expected}: its files are not of one model"
            )
    return processor


def change_processor(saved: PixelLMProcessor, options: ModelOptions) -> PixelLMProcessor:
    """The saved processor with the chosen options changed."""
    settings = {**saved.settings(), **options.chosen(PixelLMProcessor)}
    PixelLMProcessor.prepare_tokenizer(saved.tokenizer, settings["num_scales"], settings["tokens_per_scale"])
    return PixelLMProcessor(saved.tokenizer, **settings)


def change_config(saved: PixelLMConfig, processor: PixelLMProcessor, options: ModelOptions) -> PixelLMConfig:
    """The saved config with the chosen options changed, and the token ids of the processor."""
    fields = saved.to_dict()
    chosen = options.chosen(PixelLMConfig)
    for name, owner in (("token_fusion_value", "tokens_per_scale"), ("scale_fusion_value", "num_scales")):
        if owner in chosen and chosen[owner] != fields[owner]:
            fields[name] = None
    fields.update(chosen)
    fields["vision_config"] = {**fields["vision_config"], "image_size": fields["image_size"]}
    fields.update(token_ids(processor))
    return PixelLMConfig(**fields)

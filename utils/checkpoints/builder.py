"""A folder + options -> a PixelLM, ready to train; and a PixelLM -> a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import is_flash_attn_2_available

from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor, check_groups
from model.structures import FLASH_ATTENTION, SDPA
from utils.checkpoints.adapters import TrainingRecipe, choose_trainable, inject_lora, merge_lora
from utils.checkpoints.folders import BuildError, first_sentence, local_folder
from utils.checkpoints.layouts import ModelSource, recognise
from utils.checkpoints.layouts.published_pixellm import is_released_training_state, read_training_state
from utils.checkpoints.load_report import LoadReport
from utils.checkpoints.options import MASK_PARTS, BuiltModel, ModelOptions
from utils.checkpoints.published_extras import PublishedExtras
from utils.checkpoints.tensor_files import StoredTensors, no_weights
from utils.checkpoints.weight_loading import OnParameterLoaded, empty_model, fill_model, load_weights_into

# What scripts and tests ask of this package comes from here.
__all__ = [
    "MASK_PARTS",
    "BuildError",
    "BuiltModel",
    "LoadReport",
    "ModelOptions",
    "OnParameterLoaded",
    "TrainingRecipe",
    "build_model",
    "build_training_state",
    "choose_trainable",
    "inject_lora",
    "is_released_training_state",
    "language_tensors",
    "load_weights_into",
    "merge_lora",
    "save_model",
]

NEW_ROWS = "rows of the added tokens are drawn around the mean of the others"


def build_model(
    version: str,
    vision_tower: str | None = None,
    options: ModelOptions | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str = SDPA,
    load_weights: bool = True,
    to_train: bool = False,
    on_parameter_loaded: OnParameterLoaded | None = None,
) -> BuiltModel:
    """Build from local folders.

    Args:
        version: a PixelLM folder that we saved (to train on, or to enlarge), a published PixelLM, a LLaVA, or a plain
            language model's folder; README.md lists all layouts.
        vision_tower: a CLIP or SigLIP folder; needed where `version` holds no tower.
        dtype: what weights are loaded into, read one by one; None leaves each in the type it is stored in, and what is
            new in float32, for callers that choose themselves.
        load_weights: False leaves the weights as initialised, for callers that load all of them themselves.
        to_train: the fusion weights that a release holds constant become learned and start at those constants, unless
            the options say otherwise.
        on_parameter_loaded: called with every parameter as soon as it has its numbers: to keep only a rank's part of
            them, say, so that no process ever holds all.

    Raises:
        BuildError: a folder is missing or is not what is expected, tensors do not fit, or parts do not work together.
    """
    options = options or ModelOptions()
    folder = local_folder(version, "--version")
    if attn_implementation == FLASH_ATTENTION and not is_flash_attn_2_available():
        raise BuildError(
            f"--attn_implementation {FLASH_ATTENTION} needs the package flash-attn and a CUDA GPU, which are not here: "
            "install it, or choose sdpa"
        )
    options = replace(options, learn_fusion=to_train)
    with _explain_refusal(folder):
        checkpoint = recognise(folder)
        source = checkpoint.layout.read(checkpoint, vision_tower, options)
        if load_weights and not checkpoint.tensors:
            raise no_weights(folder)
        built = _load_model(source, dtype, attn_implementation, load_weights, on_parameter_loaded)
    if to_train:
        # Random Fourier features lose what they are for in 16 bits, whatever type they were saved in.
        for buffer in built.model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
    return built


def build_training_state(
    weight: str,
    version: str,
    vision_tower: str | None,
    options: ModelOptions | None = None,
    *,
    lora_alpha: float,
    dtype: torch.dtype | None = torch.float32,
) -> BuiltModel:
    """Build what the original's training left: the PEFT-wrapped state of a published PixelLM, its LoRA merged.

    Args:
        weight: the file or folder with the state. version: the LLaVA it was trained over, for config and tokenizer.
        vision_tower: the tower's folder, for its config.

    Raises:
        BuildError: as `build_model`.
    """
    with _explain_refusal(Path(weight)):
        source = read_training_state(weight, version, vision_tower, options or ModelOptions(), lora_alpha)
        return _load_model(source, dtype, SDPA, True, None)


@contextmanager
def _explain_refusal(place: Path) -> Iterator[None]:
    """Turn what configs and libraries raise for values that do not go together into BuildError."""
    try:
        yield
    except BuildError:
        raise
    except (ValueError, KeyError, ImportError) as error:
        raise BuildError(f"cannot build a PixelLM from {place}: {first_sentence(error)}") from error


def _load_model(
    source: ModelSource,
    dtype: torch.dtype | None,
    attn_implementation: str,
    load_weights: bool,
    on_parameter_loaded: OnParameterLoaded | None,
) -> BuiltModel:
    """The model of a source with its weights, in evaluation mode; the other arguments are those of `build_model`."""
    if load_weights:
        model = empty_model(source.config, attn_implementation)
        report = fill_model(
            model,
            source.tensors,
            source.origins,
            dtype=dtype,
            allow_missing=source.allow_missing,
            rows=source.token_rows,
            on_parameter_loaded=on_parameter_loaded,
        )
        report.newly_initialized |= source.newly_initialized
        if source.config.text_config.vocab_size > source.token_rows:
            report.newly_initialized["language_model.embeddings"] = NEW_ROWS
        if source.check is not None:
            source.check(model.eval())
    else:
        source.config._attn_implementation = attn_implementation
        model = PixelLMForCausalLM(source.config).to(dtype or torch.float32)
        report = LoadReport()
    report.layout = source.layout
    report.ignored |= source.ignored
    check_groups(source.processor)
    return BuiltModel(model.eval(), source.processor, report, source.published)


def language_tensors(folder: Path) -> StoredTensors:
    """The language model's tensors in a folder that `build_model` takes, by their names in our model.

    Raises:
        BuildError: the folder holds no weights, or is of a model that this program does not run.
    """
    checkpoint = recognise(folder)
    if not checkpoint.tensors:
        raise no_weights(folder)
    return checkpoint.layout.language_tensors(checkpoint)


def save_model(
    model: PixelLMForCausalLM,
    processor: PixelLMProcessor,
    folder: str | Path,
    max_shard_size: str = "5GB",
    left_out: tuple[str, ...] = (),
    published: PublishedExtras | None = None,
) -> None:
    """One Hugging Face folder: safetensors, config, processor, and the code that both need.

    Args:
        published: what a published PixelLM held beside, kept with the model.
        left_out: parts whose weights are not written, such as `MASK_PARTS` of a base that only ever learned words: they
            are new when it is trained on.
    """
    weights = model.state_dict()
    kept = {name: value for name, value in weights.items() if name.split(".")[0] not in left_out}
    # Names as in the model; by itself transformers writes some kinds under the names of their first release.
    model.save_pretrained(
        folder,
        state_dict=kept if left_out else None,
        max_shard_size=max_shard_size,
        save_original_format=False,
    )
    processor.save_pretrained(folder)
    if published is not None:
        published.save(Path(folder))

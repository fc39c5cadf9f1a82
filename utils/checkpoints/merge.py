"""Merging what training left into one folder, by the run's own records or by its base."""

import logging
from pathlib import Path

import torch

from model.structures import DTYPES, LORA_ALPHA
from utils.checkpoints.builder import (
    MASK_PARTS,
    BuiltModel,
    ModelOptions,
    build_model,
    build_training_state,
    is_released_training_state,
    language_tensors,
)
from utils.checkpoints.export import export_model, find_lora, load_and_merge, read_trained_weights
from utils.checkpoints.run_model import RunModel
from utils.cli.config import MergeConfig, model_options
from utils.cli.errors import UserError

logger = logging.getLogger(__name__)


def merge_run(run: RunModel, config: MergeConfig, given: MergeConfig) -> str:
    """Merge a run that left its config, processor and adapter settings.

    Args:
        given: what the command line alone said; in `config` the run's records stand where it said nothing.

    Returns:
        What was done, for a person.
    """
    weights = read_trained_weights(config.weight)
    check_lora(config, weights, run.recipe.lora_alpha)
    warn_about_flags(given, run)
    options = ModelOptions(**model_options(given.model))
    built, layers = run.merge(weights, config.weight, options, given.model.version)
    has_masks = run.recipe.train_mask_decoder and config.train_mask_decoder
    return save(built, config, f"LoRA of {layers} layers merged", has_masks)


def merge_without_record(config: MergeConfig) -> str:
    """Merge what a run of the original, or an earlier one of ours, left: its base says what it is.

    Returns what was done, for a person, as `merge_run` does.
    """
    version, tower = config.model.version, config.model.vision_tower or None
    if not version:
        raise UserError("--version is missing, and no run card near --weight names the base: give the base's folder")
    options, alpha = ModelOptions(**model_options(config.model)), config.lora_alpha or LORA_ALPHA
    if is_released_training_state(config.weight):
        built = build_training_state(config.weight, version, tower, options, lora_alpha=alpha)
        logger.info(built.report.table())
        return save(built, config, built.report.layout, config.train_mask_decoder)
    weights = read_trained_weights(config.weight)
    check_lora(config, weights, alpha)
    quantized = config.load_in_8bit or config.load_in_4bit
    built = build_model(version, tower, options, load_weights=False, to_train=True)
    frozen = language_tensors(Path(version).expanduser()) if quantized else {}
    layers = load_and_merge(built, weights, config.weight, alpha, frozen)
    return save(built, config, f"LoRA of {layers} layers merged", config.train_mask_decoder)


def check_lora(config: MergeConfig, weights: dict[str, torch.Tensor], lora_alpha: float) -> None:
    """UserError where flags say otherwise than the weights, or than `lora_alpha`, with which they were trained."""
    lora = find_lora(weights, config.weight)
    if lora is not None and config.lora_r is not None and config.lora_r != lora[0]:
        raise UserError(f"--lora_r is {config.lora_r}, but {config.weight} holds LoRA of rank {lora[0]}: leave it out")
    if config.lora_alpha is not None and config.lora_alpha != lora_alpha:
        raise UserError(f"--lora_alpha is {config.lora_alpha}, but training had {lora_alpha}: leave it out")


def warn_about_flags(given: MergeConfig, run: RunModel) -> None:
    """Name the flags that do nothing because the run's records say it all."""
    flags = {
        "--version": given.model.version and run.bits is None,
        "--vision_tower": given.model.vision_tower,
        "--load_in_8bit": given.load_in_8bit and run.bits != 8,
        "--load_in_4bit": given.load_in_4bit and run.bits != 4,
    }
    if names := ", ".join(name for name, is_given in flags.items() if is_given):
        logger.warning(f"{names}: no effect, {run.folder} says what was trained, and --weight holds its weights")


def save(built: BuiltModel, config: MergeConfig, what: str, has_masks: bool) -> str:
    """Write the folder in the precision that was asked for; returns a line that says `what` was done.

    Args:
        has_masks: whether the parts for masks trained; left as they were initialised they are not worth keeping.
    """
    built.model.to(DTYPES[config.precision])
    export_model(built, config.save_path, config.max_shard_size, () if has_masks else MASK_PARTS)
    size = sum(parameter.numel() for parameter in built.model.parameters())
    return f"{config.save_path}: {size:,} parameters in {config.precision}, {what}"

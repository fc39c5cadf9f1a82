"""A training run from its config to its last checkpoint."""

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

import numpy as np

from model.processing_pixellm import required_vocab_size
from model.structures import DTYPES
from utils.checkpoints.builder import (
    MASK_PARTS,
    BuiltModel,
    ModelOptions,
    OnParameterLoaded,
    TrainingRecipe,
    build_model,
    choose_trainable,
    load_weights_into,
)
from utils.checkpoints.export import read_trained_weights
from utils.checkpoints.quantized_layers import quantize_frozen
from utils.checkpoints.run_model import save_run_model
from utils.cli.config import TrainConfig, model_options
from utils.cli.parser import flatten
from utils.cli.run_card import write_run_card
from utils.data.mixture import build_mixture
from utils.engine.base import Engine
from utils.engine.fit import Run
from utils.engine.lock import lock_folder
from utils.engine.preflight import preflight
from utils.engine.probe import find_probe_batch, log_gradients, probe_gradients
from utils.engine.runtime import Runtime, current_device, open_runtime
from utils.engine.setup import (
    StepBatches,
    checkpoint_to_resume,
    make_engine,
    make_on_parameter_loaded,
    make_plan,
    refuse_missing_data,
    run_facts,
    seed_everything,
    zero_stage,
)
from utils.engine.stepping import to_precision

logger = logging.getLogger(__name__)


class Validator(Protocol):
    """Scores the model while it trains; all ranks call it together."""

    def scores(self) -> dict[str, float]:
        """Scores by name, the same on every rank."""

    def images(self) -> dict[str, np.ndarray]:
        """Images to show by name, uint8 (H, W, 3)."""


def train(config: TrainConfig, make_validator: Callable[[TrainConfig, Engine, BuiltModel], Validator | None]) -> None:
    """Train, or with --eval_only validate once, as `config` says. make_validator: gives None for no validation."""
    refuse_missing_data(config.data, config.validation)
    settings = config.engine
    runtime = open_runtime(settings.engine, settings.local_rank, settings.precision, settings.deterministic)
    if runtime.rank == 0 and not config.validation.eval_only:
        lock_folder(config.run.folder)
    seed_everything(settings.seed)
    on_parameter_loaded = make_on_parameter_loaded(config, runtime)
    built, trained = build_for_training(config, on_parameter_loaded)
    seed_everything(settings.seed + runtime.rank)
    batches, flops = None, 0.0
    if not config.validation.eval_only:
        mixture = build_mixture(config.data, settings.seed)
        batches = StepBatches(config, runtime, mixture, built.processor)
        tokens = required_vocab_size(built.processor.tokenizer)
        preflight(config, runtime, built.model, tokens, mixture, zero_stage(settings, runtime))
        flops = 0.0 if on_parameter_loaded else probe(config, runtime, built, trained, batches)
    engine = make_engine(config, runtime, built.model, tuple(f"{part}." for part in MASK_PARTS))
    validator = make_validator(config, engine, built)
    hooks = (validator.scores, validator.images) if validator else (None, None)
    run = Run(engine, make_plan(config, engine.world_size), config.run.folder, *hooks)
    run.throughput.flops_per_image = flops
    if (checkpoint := checkpoint_to_resume(config.run)) is not None:
        run.resume(checkpoint)
    else:
        run.progress.step = config.optimizer.start_epoch * config.optimizer.steps_per_epoch
    if batches is None:
        run.evaluate()
    else:
        if runtime.rank == 0:
            facts = run_facts(runtime, batches, run.progress.step) | card_of(built, trained)
            write_run_card(config.run.folder, arguments=flatten(config), facts=facts)
            recipe, bits = training_recipe(config), config.adapter.bits
            save_run_model(config.run.folder, built, recipe, bits, config.model.version)
        run.fit(batches)
        batches.report_losses()
    engine.close()


def build_for_training(
    config: TrainConfig, on_parameter_loaded: OnParameterLoaded | None = None
) -> tuple[BuiltModel, list[str]]:
    """The model with what trains chosen, in the run's precision, and the names of those parameters."""
    # As stored: `to_precision` then gives every tensor the type it trains or rests in.
    built = build_model(
        config.model.version,
        config.model.vision_tower or None,
        ModelOptions(**model_options(config.model)),
        dtype=None,
        attn_implementation=config.engine.attn_implementation,
        to_train=True,
        on_parameter_loaded=on_parameter_loaded,
    )
    logger.info(built.report.table())
    if not built.model.shares_prefixes:
        attention = config.engine.attn_implementation
        logger.warning(f"every conversation is a row of its own: {attention} attention takes no mask of ours")
    if config.adapter.bits:
        quantize_frozen(built.model, config.adapter.bits, DTYPES[config.engine.precision], current_device())
    trained = choose_trainable(built.model, training_recipe(config))
    if config.run.weight:
        load_weights_into(built.model, read_trained_weights(config.run.weight), f"--weight {config.run.weight}")
    if config.engine.gradient_checkpointing:
        built.model.activation_checkpointing_enable({"use_reentrant": False})
    to_precision(built.model, config.engine.precision)
    return built, trained


def training_recipe(config: TrainConfig) -> TrainingRecipe:
    """What trains."""
    return TrainingRecipe(**{entry.name: getattr(config.adapter, entry.name) for entry in fields(TrainingRecipe)})


def probe(config: TrainConfig, runtime: Runtime, built: BuiltModel, trained: list[str], batches: StepBatches) -> float:
    """Stop, by name, where gradients do not reach what trains, or reach what does not; operations per image."""
    wanted = ["ce", "bce"] if config.adapter.train_mask_decoder else ["ce"]
    batch = find_probe_batch(built.model, batches.probes(), wanted)
    flops = probe_gradients(built.model.to(runtime.device), batch, trained, config.engine.precision, runtime.device)
    log_gradients(built.model)
    return flops / len(batch.info)


def card_of(built: BuiltModel, trained: list[str]) -> dict[str, Any]:
    """What a run card keeps about the model."""
    return {
        "loaded": built.report.as_dict(),
        "trained": trained,
        "packs_conversations": built.model.shares_prefixes,
    }

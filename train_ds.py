"""Train a PixelLM: read the run, build, fit.

deepspeed train_ds.py --version=... --vision-tower=... --dataset_dir=./dataset --exp_name=mine
python train_ds.py --config configs/tiny.yaml --version runs/demo/base
"""

import logging
import sys
from dataclasses import fields
from pathlib import Path

from model.overlay import draw_overlay
from model.predictor import Predictor
from model.processing_pixellm import ConversationTooLong, rows_needed
from model.structures import DTYPES
from utils.checkpoints.builder import (
    MASK_PARTS,
    BuiltModel,
    ModelOptions,
    Settle,
    TrainingRecipe,
    build_model,
    choose_trainable,
    load_weights_into,
)
from utils.checkpoints.export import read_trained_weights
from utils.checkpoints.quantized_layers import hold_in_bits
from utils.cli.commands import parse_train
from utils.cli.config import TrainConfig, model_options
from utils.cli.errors import run_script
from utils.cli.parser import flatten
from utils.cli.run_card import write_run_card
from utils.data.readers.registry import build_eval_reader
from utils.engine.fit import Run
from utils.engine.lock import lock_folder
from utils.engine.preflight import preflight
from utils.engine.probe import find_probe_batch, probe_gradients, say_reached
from utils.engine.protocol import Engine
from utils.engine.runtime import Runtime, device_here, open_runtime
from utils.engine.setup import (
    StepBatches,
    checkpoint_to_resume,
    make_engine,
    make_mixture,
    make_plan,
    refuse_missing_data,
    run_facts,
    seed_everything,
    sharder,
    zero_stage,
)
from utils.engine.stepping import to_precision
from utils.evaluation.validation import Validation

logger = logging.getLogger("utils")


def main(argv: list[str] | None = None) -> None:
    """Train, or with --eval_only score, as the command line says."""
    config = parse_train(argv)
    refuse_missing_data(config.data, config.validation)
    runtime = open_runtime(
        config.engine.engine, config.engine.local_rank, config.engine.precision, config.engine.deterministic
    )
    if runtime.rank == 0 and not config.validation.eval_only:
        lock_folder(config.run.folder)
    seed_everything(config.engine.seed)
    settle = sharder(config, runtime)
    built, trained = build(config, settle)
    seed_everything(config.engine.seed + runtime.rank)
    batches, flops = None, 0.0
    if not config.validation.eval_only:
        mixture = make_mixture(config.data, config.engine.seed)
        batches = StepBatches(config, runtime, mixture, built.processor, (ConversationTooLong,))
        tokens, stage = rows_needed(built.processor.tokenizer), zero_stage(config.engine, runtime)
        preflight(config, runtime, built.model, tokens, mixture, stage)
        flops = 0.0 if settle else probe(config, runtime, built, trained, batches)
    held_out = (
        None
        if config.validation.no_eval
        else build_eval_reader(config.validation.val_dataset, config.data.dataset_dir, index_dir=config.data.index_dir)
    )
    engine = make_engine(config, runtime, built.model, tuple(f"{part}." for part in MASK_PARTS))
    run = make_run(config, engine, built, held_out)
    run.costs.flops_per_image = flops
    if (checkpoint := checkpoint_to_resume(config.run)) is not None:
        run.resume(checkpoint)
    else:
        run.progress.step = config.optimizer.start_epoch * config.optimizer.steps_per_epoch
    if batches is None:
        run.evaluate()
    else:
        if runtime.rank == 0:
            write_card(config, runtime, built, trained, batches, run.progress.step)
        run.fit(batches)
        batches.report_losses()
    engine.close()


def build(config: TrainConfig, settle: Settle | None = None) -> tuple[BuiltModel, list[str]]:
    """The model with what trains chosen, in the run's precision, and the names of those parameters."""
    options = ModelOptions(**model_options(config.model))
    # As stored: `to_precision` then gives every tensor the type it trains or rests in.
    built = build_model(
        config.model.version,
        config.model.vision_tower or None,
        options,
        dtype=None,
        attn_implementation=config.engine.attn_implementation,
        to_train=True,
        settle=settle,
    )
    logger.info(built.report.table())
    if not built.model.shares_prefixes:
        logger.warning(
            f"every conversation is a row of its own: {config.engine.attn_implementation} attention takes no mask "
            "of ours"
        )
    if config.adapter.bits:
        hold_in_bits(built.model, config.adapter.bits, DTYPES[config.engine.precision], device_here())
    recipe = TrainingRecipe(**{entry.name: getattr(config.adapter, entry.name) for entry in fields(TrainingRecipe)})
    trained = choose_trainable(built.model, recipe)
    if config.run.weight:
        load_weights_into(built.model, read_trained_weights(config.run.weight), f"--weight {config.run.weight}")
    if config.engine.gradient_checkpointing:
        built.model.activation_checkpointing_enable({"use_reentrant": False})
    to_precision(built.model, config.engine.precision)
    return built, trained


def probe(config: TrainConfig, runtime: Runtime, built: BuiltModel, trained: list[str], batches: StepBatches) -> float:
    """Stop, by name, where gradients do not reach what trains, or reach what does not; operations per image."""
    wanted = ["ce", "bce"] if config.adapter.train_mask_decoder else ["ce"]
    batch = find_probe_batch(built.model, batches.probes(), wanted)
    flops = probe_gradients(built.model.to(runtime.device), batch, trained, config.engine.precision, runtime.device)
    say_reached(built.model)
    return flops / len(batch.info)


def make_run(config: TrainConfig, engine: Engine, built: BuiltModel, samples: object | None) -> Run:
    """The run in its folder, with validation on `samples`."""
    if samples is None:
        return Run(engine, make_plan(config, engine.world_size), config.run.folder)
    validation = Validation(
        engine,
        Predictor(built.model, built.processor),
        samples,
        batch_size=config.validation.val_batch_size,
        limit=config.validation.val_limit,
        max_new_tokens=config.validation.max_new_tokens,
        open_image=built.processor.open_image,
        overlay=draw_overlay,
    )
    return Run(engine, make_plan(config, engine.world_size), config.run.folder, validation.scores, validation.images)


def write_card(
    config: TrainConfig, runtime: Runtime, built: BuiltModel, trained: list[str], batches: StepBatches, step: int
) -> None:
    """Leave run.json beside the checkpoints."""
    facts = run_facts(runtime, batches, step) | {"loaded": built.report.as_dict(), "trained": trained}
    facts["packs_conversations"] = built.model.shares_prefixes
    write_run_card(
        config.run.folder, arguments=flatten(config), repository=Path(__file__).resolve().parent, facts=facts
    )


if __name__ == "__main__":
    sys.exit(run_script(main))

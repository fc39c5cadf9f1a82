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
from utils.cli.arguments import TrainArguments, model_options, parse_train
from utils.cli.errors import run_script
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
)
from utils.engine.stepping import to_precision
from utils.evaluation.validation import Validation

logger = logging.getLogger("utils")


def main(argv: list[str] | None = None) -> None:
    """Train, or with --eval_only score, as the command line says."""
    args = parse_train(argv)
    refuse_missing_data(args)
    runtime = open_runtime(args.engine, args.local_rank, args.precision, args.deterministic)
    if runtime.rank == 0 and not args.eval_only:
        lock_folder(args.run_folder)
    seed_everything(args.seed)
    settle = sharder(args, runtime)
    built, trained = build(args, settle)
    seed_everything(args.seed + runtime.rank)
    batches, flops = None, 0.0
    if not args.eval_only:
        batches = StepBatches(args, runtime, make_mixture(args), built.processor, (ConversationTooLong,))
        preflight(args, runtime, built.model, rows_needed(built.processor.tokenizer), batches.dataset.mixture)
        flops = 0.0 if settle else probe(args, runtime, built, trained, batches)
    held_out = None if args.no_eval else build_eval_reader(args.val_dataset, args.dataset_dir, index_dir=args.index_dir)
    engine = make_engine(args, runtime, built.model, tuple(f"{part}." for part in MASK_PARTS))
    run = make_run(args, engine, built, held_out)
    run.costs.flops_per_image = flops
    if (checkpoint := checkpoint_to_resume(args)) is not None:
        run.resume(checkpoint)
    else:
        run.progress.step = args.start_epoch * args.steps_per_epoch
    if batches is None:
        run.evaluate()
    else:
        if runtime.rank == 0:
            write_card(args, runtime, built, trained, batches, run.progress.step)
        run.fit(batches)
        batches.report_losses()
    engine.close()


def build(args: TrainArguments, settle: Settle | None = None) -> tuple[BuiltModel, list[str]]:
    """The model with what trains chosen, in the run's precision, and the names of those parameters."""
    options = ModelOptions(**model_options(args))
    # As stored: `to_precision` then gives every tensor the type it trains or rests in.
    built = build_model(
        args.version,
        args.vision_tower or None,
        options,
        dtype=None,
        attn_implementation=args.attn_implementation,
        to_train=True,
        settle=settle,
    )
    logger.info(built.report.table())
    if not built.model.shares_prefixes:
        logger.warning(
            f"every conversation is a row of its own: {args.attn_implementation} attention takes no mask of ours"
        )
    if args.bits:
        hold_in_bits(built.model, args.bits, DTYPES[args.precision], device_here())
    recipe = TrainingRecipe(**{entry.name: getattr(args, entry.name) for entry in fields(TrainingRecipe)})
    trained = choose_trainable(built.model, recipe)
    if args.weight:
        load_weights_into(built.model, read_trained_weights(args.weight), f"--weight {args.weight}")
    if args.gradient_checkpointing:
        built.model.activation_checkpointing_enable({"use_reentrant": False})
    to_precision(built.model, args.precision)
    return built, trained


def probe(args: TrainArguments, runtime: Runtime, built: BuiltModel, trained: list[str], batches: StepBatches) -> float:
    """Stop, by name, where gradients do not reach what trains, or reach what does not; operations per image."""
    wanted = ["ce", "bce"] if args.train_mask_decoder else ["ce"]
    batch = find_probe_batch(built.model, batches.probes(), wanted)
    flops = probe_gradients(built.model.to(runtime.device), batch, trained, args.precision, runtime.device)
    say_reached(built.model)
    return flops / len(batch.info)


def make_run(args: TrainArguments, engine: Engine, built: BuiltModel, samples: object | None) -> Run:
    """The run in its folder, with validation on `samples`."""
    if samples is None:
        return Run(engine, make_plan(args, engine.world_size), args.run_folder)
    validation = Validation(
        engine,
        Predictor(built.model, built.processor),
        samples,
        batch_size=args.val_batch_size,
        limit=args.val_limit,
        max_new_tokens=args.max_new_tokens,
        open_image=built.processor.open_image,
        overlay=draw_overlay,
    )
    return Run(engine, make_plan(args, engine.world_size), args.run_folder, validation.scores, validation.images)


def write_card(
    args: TrainArguments, runtime: Runtime, built: BuiltModel, trained: list[str], batches: StepBatches, step: int
) -> None:
    """Leave run.json beside the checkpoints."""
    facts = run_facts(runtime, batches, step) | {"loaded": built.report.as_dict(), "trained": trained}
    facts["packs_conversations"] = built.model.shares_prefixes
    write_run_card(args.run_folder, arguments=args.as_dict(), repository=Path(__file__).resolve().parent, facts=facts)


if __name__ == "__main__":
    sys.exit(run_script(main))

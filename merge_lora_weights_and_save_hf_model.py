"""Turn what training left into one Hugging Face folder, LoRA merged, vision tower and processor included.

python merge_lora_weights_and_save_hf_model.py --version=BASE --weight=RUN/pytorch_model.bin --save_path=RUN/hf_model
"""

import logging
import sys
from pathlib import Path

from model.structures import DTYPES
from utils.checkpoints.builder import (
    MASK_PARTS,
    BuiltModel,
    ModelOptions,
    build_model,
    build_training_state,
    is_released_training_state,
)
from utils.checkpoints.export import fill_and_merge, lora_of, read_trained_weights, write_folder
from utils.checkpoints.quantized_layers import LAYERS
from utils.cli.arguments import MergeArguments, TrainArguments, model_options, parse_merge, trained_with
from utils.cli.errors import UserError, run_script
from utils.cli.run_card import RUN_CARD, find_run_card

logger = logging.getLogger("utils")


def main(argv: list[str] | None = None) -> int:
    """Merge as the command line and the run card say; returns the exit status."""
    asked = parse_merge(argv)
    card = find_run_card(Path(asked.weight))
    if card is None:
        logger.warning(f"no {RUN_CARD} near --weight {asked.weight}: what the flags leave out has its default")
    args = trained_with(asked, card)
    tower, options = args.vision_tower or None, ModelOptions(**model_options(args))
    if is_released_training_state(asked.weight):
        built = build_training_state(asked.weight, args.version, tower, options, lora_alpha=args.lora_alpha)
        logger.info(built.report.table())
        return save(built, asked, args, built.report.layout)
    weights = read_trained_weights(asked.weight)
    lora = lora_of(weights, asked.weight)
    if lora is not None and "lora_r" in asked.given and asked.lora_r != lora[0]:
        raise UserError(f"--lora_r is {asked.lora_r}, but {asked.weight} holds LoRA of rank {lora[0]}: leave it out")
    held = (LAYERS,) if args.bits else ()
    built = build_model(args.version, tower, options, load_weights=bool(held), to_train=True)
    layers = fill_and_merge(built, weights, asked.weight, args.lora_alpha, held)
    return save(built, asked, args, f"LoRA of {layers} layers merged")


def save(built: BuiltModel, asked: MergeArguments, args: TrainArguments, what: str) -> int:
    """Write the folder in the precision that was asked for and say `what` was done; returns the exit status."""
    built.model.to(DTYPES[args.precision])
    # What a run without masks left as it was initialised is not worth keeping.
    write_folder(built, asked.save_path, asked.max_shard_size, () if args.train_mask_decoder else MASK_PARTS)
    size = sum(parameter.numel() for parameter in built.model.parameters())
    print(f"{asked.save_path}: {size:,} parameters in {args.precision}, {what}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))

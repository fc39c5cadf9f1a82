"""Turn what training left into one Hugging Face folder, LoRA merged, vision tower and processor included.

python merge_lora_weights_and_save_hf_model.py --version=BASE --weight=RUN/pytorch_model.bin --save_path=RUN/hf_model
"""

import logging
import sys

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
from utils.cli.commands import parse_merge
from utils.cli.config import MergeConfig, model_options
from utils.cli.errors import UserError, run_script

logger = logging.getLogger("utils")


def main(argv: list[str] | None = None) -> int:
    """Merge as the command line and the run card say; returns the exit status."""
    config = parse_merge(argv)
    version, tower = config.model.version, config.model.vision_tower or None
    options = ModelOptions(**model_options(config.model))
    if is_released_training_state(config.weight):
        built = build_training_state(config.weight, version, tower, options, lora_alpha=config.lora_alpha)
        logger.info(built.report.table())
        return save(built, config, built.report.layout)
    weights = read_trained_weights(config.weight)
    lora = lora_of(weights, config.weight)
    if lora is not None and config.lora_r is not None and config.lora_r != lora[0]:
        raise UserError(f"--lora_r is {config.lora_r}, but {config.weight} holds LoRA of rank {lora[0]}: leave it out")
    held = (LAYERS,) if config.load_in_8bit or config.load_in_4bit else ()
    built = build_model(version, tower, options, load_weights=bool(held), to_train=True)
    layers = fill_and_merge(built, weights, config.weight, config.lora_alpha, held)
    return save(built, config, f"LoRA of {layers} layers merged")


def save(built: BuiltModel, config: MergeConfig, what: str) -> int:
    """Write the folder in the precision that was asked for and say `what` was done; returns the exit status."""
    built.model.to(DTYPES[config.precision])
    # What a run without masks left as it was initialised is not worth keeping.
    write_folder(built, config.save_path, config.max_shard_size, () if config.train_mask_decoder else MASK_PARTS)
    size = sum(parameter.numel() for parameter in built.model.parameters())
    print(f"{config.save_path}: {size:,} parameters in {config.precision}, {what}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))

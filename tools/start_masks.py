"""Give a tiny base mask parts that start at the words it knows, so that training on masks begins with a match.

python tools/start_masks.py --model runs/demo/base --dataset_dir runs/demo/dataset
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.build.builder import BuiltModel, build_model, save_model
from model.build.mask_start import start_masks_at_words
from utils.arguments import parse_train
from utils.data.collate import collate
from utils.data.dataset import TrainingDataset
from utils.engine.setup import make_mixture
from utils.scenes import named_shape
from utils.scripts import UserError, run_script

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
BATCH = 16


def examples(built: BuiltModel, dataset_dir: Path, count: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Batches of the mask stage's questions with the "colour form" of every target."""
    arguments = ("--config", str(CONFIG), "--version", ".", "--dataset_dir", str(dataset_dir))
    dataset = TrainingDataset(make_mixture(parse_train(list(arguments))), built.processor, count)
    for first in range(0, count, BATCH):
        batch = collate([dataset[i] for i in range(first, min(first + BATCH, count))])
        names = [
            named_shape(target.name)
            for i in range(first, min(first + BATCH, count))
            for conversation in dataset.mixture[i].conversations
            for turn in conversation
            for target in turn.targets
        ]
        unnamed = names.count(None)
        if unnamed:
            raise UserError(
                f"{unnamed} targets in {dataset_dir} have no colour and form: expected scenes of make_scenes"
            )
        yield batch.as_kwargs(), [name for name in names if name]


def main(argv: list[str] | None = None) -> None:
    """Write the folder again with mask parts."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny base")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="data root made by make_scenes")
    parser.add_argument("--samples", type=int, default=400, help="pictures whose questions are read")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    built = build_model(str(args.model))
    torch.manual_seed(args.seed)
    read = start_masks_at_words(built, examples(built, args.dataset_dir, args.samples))
    print(f"the codebook reads {read:.0%} of the words that name the targets of {args.samples} pictures")
    save_model(built.model, built.processor, args.model)


if __name__ == "__main__":
    sys.exit(run_script(main))

"""Train a PixelLM.

deepspeed train_ds.py --version=... --vision-tower=... --dataset_dir=./dataset --exp_name=mine
python train_ds.py --config configs/tiny.yaml --version runs/demo/base
"""

import sys

from utils.cli.commands import parse_train
from utils.cli.errors import run_script
from utils.engine.train import train
from utils.evaluation.validation import build_validation


def main(argv: list[str] | None = None) -> None:
    """Train, or with --eval_only score, as the command line says."""
    train(parse_train(argv), build_validation)


if __name__ == "__main__":
    sys.exit(run_script(main))

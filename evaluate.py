"""Score a saved PixelLM on questions it did not see, by protocol and by kind of question; compare, judge, quote scores.

python evaluate.py runs/demo/model --dataset_dir runs/demo/dataset --val_dataset "refcoco|unc|val" --out runs/eval/demo
torchrun --nproc_per_node 8 evaluate.py runs/model --val_dataset "refcoco|unc|val" --out runs/eval/eight
python evaluate.py --compare runs/eval/demo runs/eval/other
python evaluate.py --judge runs/eval/muse --judge_url https://host/v1 --judge_model NAME
python evaluate.py --table runs/eval/demo
"""

import sys

from utils.cli.commands import parse_evaluate
from utils.cli.errors import run_script
from utils.evaluation.run import evaluate


def main(argv: list[str] | None = None) -> None:
    """Score, compare, judge or quote as the command line says."""
    words = list(sys.argv[1:] if argv is None else argv)
    if told := evaluate(parse_evaluate(words), words):
        print(told)


if __name__ == "__main__":
    sys.exit(run_script(main))

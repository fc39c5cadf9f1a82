"""Score a saved PixelLM on questions it did not see, by protocol and by kind of question; compare, judge, quote scores.

python evaluate.py runs/demo/model --dataset_dir runs/demo/dataset --val_dataset "refcoco|unc|val" --out runs/eval/demo
torchrun --nproc_per_node 8 evaluate.py runs/model --val_dataset "refcoco|unc|val" --out runs/eval/eight
python evaluate.py --compare runs/eval/demo runs/eval/other
python evaluate.py --judge runs/eval/muse --judge_url https://host/v1 --judge_model NAME
python evaluate.py --table runs/eval/demo
"""

import sys
from pathlib import Path

from model.structures import DTYPES
from utils.cli.commands import parse_evaluate
from utils.cli.config import EvaluateConfig
from utils.cli.errors import run_script
from utils.evaluation.compare import compare_folders
from utils.evaluation.ranks import device_of_rank, open_ranks
from utils.evaluation.results import read_results
from utils.evaluation.run import Session, judge_folder
from utils.evaluation.scored_predictor import LogitPredictor, ScoredPredictor
from utils.evaluation.tables import quotable


def main(argv: list[str] | None = None) -> int:
    """Score, compare, judge or quote as the command line says; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse_evaluate(words)
    if config.compare:
        out = Path(config.out) if config.out else None
        print(compare_folders(*config.compared(), out))
    elif config.table:
        print("\n\n".join(quotable(read_results(Path(config.table)))))
    elif config.judge:
        judge_folder(Path(config.judge), config)
        print("\n\n".join(quotable(read_results(Path(config.judge)))))
    else:
        score(config, words)
    return 0


def score(config: EvaluateConfig, words: list[str]) -> None:
    """Ask the model every question, on all ranks of the launcher, and write what came of it into --out."""
    ranks = open_ranks()
    session = Session(config, words, ranks)
    model = config.model
    dtype = DTYPES[model.precision] if model.precision else None
    kind = LogitPredictor if session.needs_logits else ScoredPredictor
    predictor = kind.from_pretrained(model.version, device_of_rank(model.device), dtype, model.attn_implementation)
    if said := session.score(predictor):
        print(said)
    ranks.close()


if __name__ == "__main__":
    sys.exit(run_script(main))

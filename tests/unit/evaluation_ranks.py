"""One rank of an evaluation with a model whose answers are known: evaluation_ranks.py DATA OUT MOST.

It draws every target a pixel beside its place, and before batch number MOST (−1: never) is killed as by `kill -9`, or
where it is the only rank interrupted.
"""

import os
import signal
import sys
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.unit.test_evaluation_kinds import Known, answer
from utils.cli.commands import parse_evaluate
from utils.evaluation import html_report
from utils.evaluation.ranks import open_ranks
from utils.evaluation.run import Evaluation

SPEC = "grefcoco|unc|train||MultiReasonSeg|val||llava_instruct_150k|train"


class Shaky(Known):
    """Moves masks; dies when asked too often."""

    asked = 0
    most = -1

    def answer(self, images: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
        if self.asked == self.most:
            if "RANK" not in os.environ:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked += 1
        return super().answer(images, questions, image_index, max_new_tokens)

    def _one(self, path: str, question: Any, given: bool) -> Any:
        if not isinstance(question, str):
            return answer([], ["a", question[-1][0]])
        return super()._one(path, question, given)

    def fits(self, turns: Any) -> bool:
        return True

    def likelihoods(self, images: Any, conversations: Any, image_index: Any) -> list[tuple[float, int]]:
        return [(0.5 * len(turns[-1][1]), len(turns[-1][1])) for turns in conversations]


def moved(truths: np.ndarray, names: list[str], given: bool) -> Any:
    return answer(np.roll(truths, 1, axis=2), names)


def main(data: str, out: str, most: str) -> None:
    words = ["--version", data, f"--dataset_dir={data}", f"--val_dataset={SPEC}", "--protocol=free,teacher,release"]
    args = parse_evaluate([*words, f"--out={out}", "--batch_size=1", "--no_shuffled", "--gallery=2"])
    ranks = open_ranks()
    evaluation = Evaluation(args, words, ranks)
    predictor = Shaky(evaluation.plan, moved)
    predictor.most = int(most)
    with patch.object(html_report, "open_image", lambda path: np.zeros((24, 32, 3), np.uint8)):  # there are no files
        evaluation.score(predictor)
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

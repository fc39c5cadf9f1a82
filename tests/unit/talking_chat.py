"""chat.py as it is, but its model's words are given: test_chat_terminal.py runs it in a process of its own.

python -m tests.unit.talking_chat '{"answers": [[5, 2], ...], "pause": 0.0}' FLAGS...

answers: token ids, one answer after the other and then from the first on again. pause: seconds before each token.
"""

import itertools
import json
import sys
import time
from typing import Any
from unittest.mock import patch

import torch

import chat
from tests.unit.pseudo_terminal import own_terminal
from utils.cli.errors import run_script


class Wording:
    """Stands in for the language model's head."""

    def __init__(self, answers: list[list[int]], pause: float) -> None:
        self._coming, self._pause = itertools.cycle(answers), pause
        self._chosen: dict[int, list[int]] = {}

    def __call__(self, model: Any, states: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        time.sleep(self._pause)
        logits = states.new_zeros((len(states), model.get_output_embeddings().weight.shape[0]))
        for number, (prompt, place) in enumerate(places):
            if place == 0:
                self._chosen[prompt] = next(self._coming)
            answer = self._chosen[prompt]
            logits[number, answer[min(place, len(answer) - 1)]] = 1.0
        return logits


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    if sys.stdin.isatty():
        own_terminal()
    with patch("model.generation.compute_logits", Wording(told["answers"], told["pause"])):
        sys.exit(run_script(chat.main, sys.argv[2:]))

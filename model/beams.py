"""Beams: several answers to each prompt followed at once, the best of them kept.

Axes: C prompts, R answers being followed, N tokens fed in one pass, H language width, V vocabulary.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from .generation import Decoding, DecodingLoop, Row, next_logits, processed


class BeamLoop(DecodingLoop):
    """The decoding loop over `decoding.num_beams` answers to each prompt.

    After every pass the likeliest continuations of a prompt's answers are taken: those that end are set aside, the
    others followed. Answers are weighed by the mean logarithm of their tokens' probabilities, the end token included
    (transformers' beam search with a length penalty of 1). A prompt is done when as many answers as there are beams
    have ended and none that is followed weighs more at its present length than the least of them.
    """

    settled = False

    def __init__(self, *what: Any) -> None:
        """What `DecodingLoop` takes, its `decoding` with more than one beam."""
        super().__init__(*what)
        self._ended: list[list[Row]] = [[] for _ in self.rows]

    def _choose(self, states: torch.Tensor) -> None:
        """Follow the best continuations after (R, N, H) states, of which the last say what comes next."""
        log_probabilities = self._log_probabilities(states[:, -1])
        followed: list[Row] = []
        origins: list[int] = []
        for number in dict.fromkeys(row.number for row in self._live):
            members = [index for index, row in enumerate(self._live) if row.number == number]
            for index, row in self._continued(number, members, log_probabilities, states):
                origins.append(index)
                followed.append(row)
        self._live = followed
        self._keep(origins)

    def _log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """(R, V) float32 of every answer with each token behind it."""
        logits = next_logits(self.model, states, [(row.number, len(row.answer)) for row in self._live])
        rows = [
            processed(self.decoding.processors, row, logits[index : index + 1]) for index, row in enumerate(self._live)
        ]
        so_far = torch.tensor([row.log_probability for row in self._live], device=logits.device)
        return so_far[:, None] + torch.cat(rows).float().log_softmax(dim=-1)

    def _continued(
        self, number: int, members: list[int], log_probabilities: torch.Tensor, states: torch.Tensor
    ) -> list[tuple[int, Row]]:
        """The answers to prompt `number` that are followed next, each with the live row that it continues; none when
        the prompt is done, whose best answer is then its row.
        """
        beams, ended = self.decoding.num_beams, self._ended[number]
        scores = log_probabilities[members]
        # One end token for each answer: among twice as many there are enough that go on.
        best = scores.flatten().topk(min(2 * beams, scores.numel()))
        found: list[tuple[int, Row]] = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            if score == -math.inf:
                break
            member, token = divmod(place, scores.shape[1])
            index = members[member]
            row = self._with(self._live[index], token, score, states[index, -1])
            if row.done and rank < beams:
                ended.append(row)
            elif not row.done and len(found) < beams:
                found.append((index, row))
        ended.sort(key=_weight, reverse=True)
        del ended[beams:]
        if found and (len(ended) < beams or _weight(found[0][1]) > _weight(ended[-1])):
            return found
        self.rows[number] = ended[0]
        return []

    def _with(self, row: Row, token: int, log_probability: float, state: torch.Tensor) -> Row:
        """A copy of `row` with a token behind its answer, which (H,) `state` chose."""
        longer = replace(row, answer=[*row.answer], states={**row.states}, log_probability=log_probability)
        self._take(longer, token, state)
        longer.position += 1 if row.waiting else 0
        longer.waiting = [token]
        return longer


def _weight(row: Row) -> float:
    return row.log_probability / len(row.answer)


def loop_class(decoding: Decoding | None) -> type[DecodingLoop]:
    """The loop that decodes as asked."""
    return BeamLoop if decoding is not None and decoding.num_beams > 1 else DecodingLoop

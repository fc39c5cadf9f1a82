"""Beams: several answers to each prompt followed at once, the best of them kept.

Axes: C prompts, R answers being followed, N tokens fed in one pass, H language width, V vocabulary.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from .generation import Decoding, DecodingLoop, SequenceState, compute_logits, process_logits


class BeamLoop(DecodingLoop):
    """The decoding loop over `decoding.num_beams` answers to each prompt.

    After every pass the likeliest continuations of a prompt's answers are taken: those that end are set aside, the
    others followed. Answers are weighed by the mean logarithm of their tokens' probabilities, the end token included
    (transformers' beam search with a length penalty of 1). A prompt is done when as many answers as there are beams
    have ended and none that is followed weighs more at its present length than the least of them.
    """

    is_final = False

    def __init__(self, *args: Any) -> None:
        """As `DecodingLoop`, its `decoding` with more than one beam."""
        super().__init__(*args)
        self._ended: list[list[SequenceState]] = [[] for _ in self.sequences]

    def _choose(self, states: torch.Tensor) -> None:
        """Follow the best continuations after (R, N, H) states, of which the last say what comes next."""
        log_probabilities = self._log_probabilities(states[:, -1])
        followed: list[SequenceState] = []
        origins: list[int] = []
        for number in dict.fromkeys(sequence.number for sequence in self._live):
            members = [index for index, sequence in enumerate(self._live) if sequence.number == number]
            for index, sequence in self._continue_prompt(number, members, log_probabilities, states):
                origins.append(index)
                followed.append(sequence)
        self._live = followed
        self._select(origins)

    def _log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """(R, V) float32 of every answer with each token behind it."""
        logits = compute_logits(
            self.model, states, [(sequence.number, len(sequence.answer)) for sequence in self._live]
        )
        processed = [
            process_logits(self.decoding.processors, sequence, logits[index : index + 1])
            for index, sequence in enumerate(self._live)
        ]
        so_far = torch.tensor([sequence.log_probability for sequence in self._live], device=logits.device)
        return so_far[:, None] + torch.cat(processed).float().log_softmax(dim=-1)

    def _continue_prompt(
        self, number: int, members: list[int], log_probabilities: torch.Tensor, states: torch.Tensor
    ) -> list[tuple[int, SequenceState]]:
        """The answers to prompt `number` that are followed next, each with the number of the live one that it
        continues; none when the prompt is done, whose best answer is then its sequence.
        """
        beams, ended = self.decoding.num_beams, self._ended[number]
        scores = log_probabilities[members]
        # One end token for each answer: among twice as many there are enough that go on.
        best = scores.flatten().topk(min(2 * beams, scores.numel()))
        found: list[tuple[int, SequenceState]] = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            if score == -math.inf:
                break
            member, token = divmod(place, scores.shape[1])
            index = members[member]
            sequence = self._extend(self._live[index], token, score, states[index, -1])
            if sequence.done and rank < beams:
                ended.append(sequence)
            elif not sequence.done and len(found) < beams:
                found.append((index, sequence))
        ended.sort(key=_mean_log_probability, reverse=True)
        del ended[beams:]
        if found and (len(ended) < beams or _mean_log_probability(found[0][1]) > _mean_log_probability(ended[-1])):
            return found
        self.sequences[number] = ended[0]
        return []

    def _extend(
        self, sequence: SequenceState, token: int, log_probability: float, state: torch.Tensor
    ) -> SequenceState:
        """A copy of `sequence` with a token behind its answer, which (H,) `state` chose."""
        longer = replace(
            sequence, answer=[*sequence.answer], states={**sequence.states}, log_probability=log_probability
        )
        self._append(longer, token, state)
        longer.position += 1 if sequence.waiting else 0
        longer.waiting = [token]
        return longer


def _mean_log_probability(sequence: SequenceState) -> float:
    return sequence.log_probability / len(sequence.answer)


def loop_class(decoding: Decoding | None) -> type[DecodingLoop]:
    """The loop that decodes as asked."""
    return BeamLoop if decoding is not None and decoding.num_beams > 1 else DecodingLoop

"""Predictors for scoring: how likely a model finds an answer, and what its masks were made of.

Axes: C conversations, T tokens, P positions, Q targets of one answer, H W pixels of the image itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.losses import text_loss
from model.predictor import Answer, Predictor, pad_right, sort_by_image
from model.processing_pixellm import ConversationTooLong, EncodedConversation
from model.structures import IGNORE_TOKEN

Likelihood = tuple[float, int]


class ScoredPredictor(Predictor):
    """Says besides how likely it finds answers that are given, and what it has room for."""

    def fits(self, turns: Sequence[tuple[str, str | None]]) -> bool:
        """Whether a prompt, its last answer None, leaves the model within model_max_length."""
        try:
            self.processor.encode_prompt(list(turns))
        except ConversationTooLong:
            return False
        return True

    def likelihoods(
        self, images: Sequence[Any], conversations: Sequence[list[tuple[str, str]]], image_index: Sequence[int]
    ) -> list[Likelihood | None]:
        """Of the last answer of each conversation the sum of −ln p over its tokens, its end included, and how many
        they are; None where it does not fit into model_max_length whole.

        images, image_index: as `answer` takes them. conversations: C, each its turns (question, answer).
        """
        read = [self._read(turns) for turns in conversations]
        kept = [row for row, one in enumerate(read) if one is not None]
        found: list[Likelihood | None] = [None] * len(conversations)
        if not kept:
            return found
        encoded = self.encode_images(images)
        order = [kept[place] for place in sort_by_image([image_index[row] for row in kept], len(kept), len(encoded))]
        tokens = [one for row in order if (one := read[row]) is not None]
        input_ids, attention_mask = pad_right([one.input_ids for one in tokens], self.processor.end_token_id)
        labels, _ = pad_right([_last_answer(one.labels) for one in tokens], IGNORE_TOKEN)
        device = self.model.device
        with self.inference():
            output = self.model(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                labels=labels.to(device),
                original_sizes=torch.tensor([image.original_size for image in encoded], device=device),
                image_index=torch.tensor([image_index[row] for row in order], device=device),
                **self.processor.stack_images(encoded, device, self.model.dtype),
            )
            head = self.model.get_output_embeddings()
            for row, labels_P, hidden_PH in zip(order, output.labels, output.last_hidden_state, strict=True):
                wanted = labels_P[1:] != IGNORE_TOKEN
                loss = text_loss(head(hidden_PH[:-1][wanted]), labels_P[1:][wanted])
                found[row] = float(loss.sum), int(loss.count)
        return found

    def _read(self, turns: list[tuple[str, str]]) -> EncodedConversation | None:
        """The conversation's tokens; None where its last answer is not whole."""
        try:
            one = self.processor.encode_conversation(turns)
        except ConversationTooLong:
            return None
        starts = (one.labels != IGNORE_TOKEN).int().diff(prepend=torch.zeros(1, dtype=torch.int)) == 1
        whole = int(starts.sum()) == len(turns) and int(one.labels[-1]) == self.processor.end_token_id
        return one if whole else None


def _last_answer(labels_T: torch.Tensor) -> torch.Tensor:
    """Labels of the last answer alone."""
    before = (labels_T == IGNORE_TOKEN).nonzero()[-1, 0]
    kept = torch.full_like(labels_T, IGNORE_TOKEN)
    kept[before + 1 :] = labels_T[before + 1 :]
    return kept


@dataclass(frozen=True)
class AnswerWithLogits(Answer):
    """logits: float32 (Q, H, W), what the masks were made of."""

    logits: np.ndarray


class LogitPredictor(ScoredPredictor):
    """Answers keep the logits of their masks, which the release's loops count and MUSE's matching compares."""

    def _compose(self, turns: Sequence[list[int]], logits_QHW: torch.Tensor) -> AnswerWithLogits:
        return AnswerWithLogits(**vars(super()._compose(turns, logits_QHW)), logits=logits_QHW.float().cpu().numpy())

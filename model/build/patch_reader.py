"""How the tower of a tiny model learns to see before there are sentences: it tells the words of each patch.

An image token becomes the sum of the embeddings of the words that are there, which stay as they are: the language model
will find them in it as it finds words. A word's score is its embedding's product with the token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..losses import LossTerm
from .builder import BuiltModel
from .tiny import NUM_MARKS, embeddings_of

# A word that is there scores about 10 above one that is not. What the distance to the sum of words weighs.
SCORE_SHARPNESS, SUM_WEIGHT = 8.0, 4.0


@dataclass(frozen=True)
class PatchBatch:
    """pixel_values: (B, 3, P, P), pictures that fill their square. labels: (B, kinds, patches) long, numbers of words;
    0 is the word for nothing, and where a patch has it in the first kind, it shows background."""

    pixel_values: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "PatchBatch":
        return replace(self, pixel_values=self.pixel_values.to(device, dtype), labels=self.labels.to(device))

    def as_kwargs(self) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values, "labels": self.labels}


@dataclass(frozen=True)
class PatchReading:
    """losses: by name, as sums and counts."""

    losses: dict[str, LossTerm]


class PatchReader(nn.Module):
    """The tower and the projector of a model, taught to tell words; everything else of it is left out.

    Args:
        words: for each kind of word (colour, form, …) the words, the first one for what is not there; each must be one
            token.
    """

    def __init__(self, built: BuiltModel, words: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.tower, self.projector = built.model.vision_tower, built.model.projector
        for kind, embeddings in zip(words, embeddings_of(built, list(words.values())), strict=True):
            self.register_buffer(f"words_{kind}", embeddings, persistent=False)
        self.kinds = list(words)
        for kind in self.kinds[1:]:
            self.words(kind)[0] = 0  # that there is nothing is said once

    def words(self, kind: str) -> torch.Tensor:
        """(words, H) embeddings, less their marks."""
        return self.get_buffer(f"words_{kind}")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The distance to the sums, and the cross entropy of each kind."""
        return {"sum": SUM_WEIGHT} | dict.fromkeys(self.kinds, 1.0)

    def count_losses(self, labels: torch.Tensor, **_: Any) -> dict[str, float]:
        """The counts `forward` returns: patches, and by kind those that are asked for it."""
        counts = {"sum": float(labels[:, 0].numel())}
        return counts | {kind: float(self._asked(labels, kind).sum()) for kind in self.kinds}

    def _asked(self, labels: torch.Tensor, kind: str) -> torch.Tensor:
        """(B, patches) bool. The first kind is asked of all patches, the others where they have a word."""
        number = self.kinds.index(kind)
        return labels[:, number] >= min(number, 1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> PatchReading:
        """Arguments as the fields of `PatchBatch`."""
        size = torch.tensor(pixel_values.shape[-2:], device=pixel_values.device).expand(len(pixel_values), -1)
        tokens = self.projector(self.tower(pixel_values, size)[0])[..., :-NUM_MARKS]
        tables = {kind: self.words(kind)[:, :-NUM_MARKS] for kind in self.kinds}
        sums = torch.stack([tables[kind][labels[:, number]] for number, kind in enumerate(self.kinds)]).sum(dim=0)
        counts = self.count_losses(labels)
        losses = {"sum": LossTerm((tokens - sums).square().mean(dim=-1).sum(), torch.tensor(counts["sum"]))}
        for number, kind in enumerate(self.kinds):
            asked = self._asked(labels, kind)
            scores, truth = tokens[asked] @ tables[kind].T, labels[:, number][asked]
            missed = F.cross_entropy(scores / SCORE_SHARPNESS, truth, reduction="sum")
            losses[kind] = LossTerm(missed, torch.tensor(counts[kind]))
        return PatchReading(losses)

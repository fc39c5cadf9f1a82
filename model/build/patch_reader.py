"""How the tower of a tiny model learns to see before there are sentences: it tells the words of each patch.

An image token becomes the sum of the embeddings of the words that are there, which stay as they are: the language model
will find them in it as it finds words. A word's score is its embedding's product with the token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..losses import LossTerm
from .builder import BuiltModel
from .tiny import NUM_MARKS, embeddings_of

# A word that is there scores about 10 above one that is not. What the distance to the sum of words weighs, and the
# question to an earlier layer, which is asked of many patches that show nothing.
SCORE_SHARPNESS, SUM_WEIGHT, EARLY_WEIGHT = 8.0, 4.0, 12.0
NOT_ASKED = -1


@dataclass(frozen=True)
class PatchBatch:
    """pixel_values: (B, 3, P, P), pictures that fill their square. labels: (B, kinds, patches) long, numbers of words;
    0 is the word for nothing, -1 where a kind is not asked for."""

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
        may_lack: kinds, beside the first, that may be asked for where there is nothing of them.
        early: kinds that a hidden state of the tower, of this number, is asked for too, on every patch, through a linear
            map of its own: what later layers compare must be there before they can learn to compare it.
    """

    def __init__(
        self,
        built: BuiltModel,
        words: Mapping[str, Sequence[str]],
        may_lack: Sequence[str] = (),
        early: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.tower, self.projector = built.model.vision_tower, built.model.projector
        for kind, embeddings in zip(words, embeddings_of(built, list(words.values())), strict=True):
            self.register_buffer(f"words_{kind}", embeddings, persistent=False)
        self.kinds, self.may_lack = list(words), frozenset(may_lack)
        for kind in self.kinds[1:]:
            self.words(kind)[0] = 0  # that there is nothing is said once
        width = self.tower.model.config.hidden_size
        self.asked_at = dict(early)
        self.early = nn.ModuleDict({kind: nn.Linear(width, len(words[kind])) for kind in early})

    def words(self, kind: str) -> torch.Tensor:
        """(words, H) embeddings, less their marks."""
        return self.get_buffer(f"words_{kind}")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The distance to the sums, and the cross entropy of each kind, from the tokens and from the earlier layer."""
        return (
            {"sum": SUM_WEIGHT}
            | dict.fromkeys(self.kinds, 1.0)
            | {f"early_{kind}": EARLY_WEIGHT for kind in self.early}
        )

    def count_losses(self, labels: torch.Tensor, **_: Any) -> dict[str, float]:
        """The counts `forward` returns: patches, and by kind those that are asked for it."""
        counts = {"sum": float(labels[:, 0].numel())}
        counts |= {kind: float(asked.sum()) for kind, asked in zip(self.kinds, _asked(labels), strict=True)}
        return counts | {f"early_{kind}": counts["sum"] for kind in self.early}

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> PatchReading:
        """Arguments as the fields of `PatchBatch`."""
        size = torch.tensor(pixel_values.shape[-2:], device=pixel_values.device).expand(len(pixel_values), -1)
        states = self._hidden_states(pixel_values, size)
        tokens = self.projector(states[self.tower.layer_indices[0]])[..., :-NUM_MARKS]
        missed = {"sum": (tokens - self._sums(labels)).square().mean(dim=-1).sum()}
        for kind, truth, asked in zip(self.kinds, labels.unbind(1), _asked(labels), strict=True):
            scores = self._scores(kind, tokens[asked])
            missed[kind] = F.cross_entropy(scores / SCORE_SHARPNESS, truth[asked], reduction="sum")
        for kind, read in self.early.items():
            truth = labels[:, self.kinds.index(kind)].clamp(min=0)
            missed[f"early_{kind}"] = F.cross_entropy(read(states[self.asked_at[kind]]).mT, truth, reduction="sum")
        counts = self.count_losses(labels)
        return PatchReading({name: LossTerm(loss, torch.tensor(counts[name])) for name, loss in missed.items()})

    def _hidden_states(self, pixel_values: torch.Tensor, size: torch.Tensor) -> dict[int, torch.Tensor]:
        """(B, patches, C) the states that become tokens, and those that are asked early, by their numbers."""
        numbers = sorted({self.tower.layer_indices[0], *self.asked_at.values()})
        states = self.tower.hidden_states(pixel_values, size, numbers)
        return {n: state[:, self.tower.num_class_tokens :] for n, state in zip(numbers, states, strict=True)}

    def _sums(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, patches, H) the sums of the words that patches bear, less their marks."""
        tables = (self.words(kind)[:, :-NUM_MARKS] for kind in self.kinds)
        shown = labels.clamp(min=0).unbind(1)
        return torch.stack([table[numbers] for table, numbers in zip(tables, shown, strict=True)]).sum(dim=0)

    def _scores(self, kind: str, tokens: torch.Tensor) -> torch.Tensor:
        """(asked, words). No word says that a kind is lacking: that wins where every word is less than half there."""
        table = self.words(kind)[:, :-NUM_MARKS]
        scores = tokens @ table.T
        if kind in self.may_lack:
            half = table[1:].square().sum(dim=-1).mean() / 2
            scores = torch.cat([half.expand(len(scores), 1), scores[:, 1:]], dim=1)
        return scores


def _asked(labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each kind (B, patches) bool: where it is asked for."""
    return (labels != NOT_ASKED).unbind(1)

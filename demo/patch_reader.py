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

from demo.tiny import NUM_MARKS, embeddings_of
from model.losses import LossTerm
from utils.checkpoints.builder import BuiltModel

# A word that is there scores about 10 above one that is not. What the distance to the sum of words weighs, and the
# question to an earlier layer, which is asked of many patches that show nothing.
SCORE_SHARPNESS, SUM_WEIGHT, EARLY_WEIGHT = 8.0, 4.0, 12.0


@dataclass(frozen=True)
class PatchBatch:
    """pixel_values: (B, 3, P, P), images that fill their square. labels: (B, kinds, patches) long, numbers of words;
    0 is the word for nothing, and where a patch has it in the first kind, it shows background."""

    pixel_values: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "PatchBatch":
        return replace(self, pixel_values=self.pixel_values.to(device, dtype), labels=self.labels.to(device))

    def as_kwargs(self) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values, "labels": self.labels}

    def counted(self) -> dict[str, Any]:
        return {"labels": self.labels}


@dataclass(frozen=True)
class PatchReading:
    """losses: by name, as sums and counts."""

    losses: dict[str, LossTerm]


class PatchReader(nn.Module):
    """The tower and the projector of a model, taught to tell words; everything else of it is left out.

    Args:
        words: for each kind of word (colour, form, …) the words, the first one for what is not there; each must be one
            token.
        hints: kinds that no token bears, numbered in the labels after `words`.
        early: kinds of either that the hidden state so many layers before the tokens, or the tower's first, is asked
            for, on every patch, through a map of its own: what is compared must be there before it can be.
    """

    def __init__(
        self,
        built: BuiltModel,
        words: Mapping[str, Sequence[str]],
        hints: Mapping[str, Sequence[str]] = MappingProxyType({}),
        early: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.tower, self.projector = built.model.vision_tower, built.model.projector
        for kind, embeddings in zip(words, embeddings_of(built, list(words.values())), strict=True):
            self.register_buffer(f"words_{kind}", embeddings, persistent=False)
        self.kinds = list(words)
        for kind in self.kinds[1:]:
            self.words(kind)[0] = 0  # that there is nothing is said once
        numbered = {**words, **hints}
        states = {kind: max(0, self.tower.layer_indices[0] - before) for kind, before in early.items()}
        self.early = [(f"early_{kind}", states[kind], list(numbered).index(kind)) for kind in early]
        width = self.tower.model.config.hidden_size
        self.maps = nn.ModuleList(nn.Linear(width, len(numbered[kind])) for kind in early)

    def words(self, kind: str) -> torch.Tensor:
        """(words, H) embeddings, less their marks."""
        return self.get_buffer(f"words_{kind}")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The distance to the sums, and the cross entropy of each kind, of the tokens and of earlier states."""
        of_tokens = {"sum": SUM_WEIGHT} | dict.fromkeys(self.kinds, 1.0)
        return of_tokens | {name: EARLY_WEIGHT for name, _, _ in self.early}

    def count_losses(self, labels: torch.Tensor, **_: Any) -> dict[str, float]:
        """The counts `forward` returns: patches, and by kind those that are asked for it."""
        counts = {"sum": float(labels[:, 0].numel())}
        counts |= {kind: float(self._asked(labels, kind).sum()) for kind in self.kinds}
        return counts | {name: counts["sum"] for name, _, _ in self.early}

    def _asked(self, labels: torch.Tensor, kind: str) -> torch.Tensor:
        """(B, patches) bool. The first kind is asked of all patches, the others where they have a word."""
        number = self.kinds.index(kind)
        return labels[:, number] >= min(number, 1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> PatchReading:
        """Arguments as the fields of `PatchBatch`."""
        size = torch.tensor(pixel_values.shape[-2:], device=pixel_values.device).expand(len(pixel_values), -1)
        states = self._hidden_states(pixel_values, size)
        tokens = self.projector(states[self.tower.layer_indices[0]])[..., :-NUM_MARKS]
        tables = {kind: self.words(kind)[:, :-NUM_MARKS] for kind in self.kinds}
        sums = torch.stack([tables[kind][labels[:, number]] for number, kind in enumerate(self.kinds)]).sum(dim=0)
        counts = self.count_losses(labels)
        losses = {"sum": LossTerm((tokens - sums).square().mean(dim=-1).sum(), torch.tensor(counts["sum"]))}
        for number, kind in enumerate(self.kinds):
            asked = self._asked(labels, kind)
            scores, truth = tokens[asked] @ tables[kind].T, labels[:, number][asked]
            missed = F.cross_entropy(scores / SCORE_SHARPNESS, truth, reduction="sum")
            losses[kind] = LossTerm(missed, torch.tensor(counts[kind]))
        for (name, state, number), read in zip(self.early, self.maps, strict=True):
            missed = F.cross_entropy(read(states[state]).mT, labels[:, number], reduction="sum")
            losses[name] = LossTerm(missed, torch.tensor(counts[name]))
        return PatchReading(losses)

    def _hidden_states(self, pixel_values: torch.Tensor, size: torch.Tensor) -> dict[int, torch.Tensor]:
        """(B, patches, C) the states that become tokens, and those that are asked early, by their numbers."""
        numbers = sorted({self.tower.layer_indices[0], *(state for _, state, _ in self.early)})
        states = self.tower.hidden_states(pixel_values, size, numbers)
        return {n: state[:, self.tower.num_class_tokens :] for n, state in zip(numbers, states, strict=True)}

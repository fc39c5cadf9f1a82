"""How the tower of a tiny model learns to see before there are sentences: it tells the words of each patch.

Both projectors make sums of words' embeddings, which stay as they are, so that a language model finds words in image
tokens as it finds them in text. An image token says all there is to say of a shape where the shape's centre is, and
"nothing" elsewhere: who counts, compares or lists shapes finds one token for each. The maps that masks are decoded from
say on every patch of a shape what colour and form it has.
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

# A word that is there scores about 10 above one that is not. What the distance to a sum of words weighs.
SCORE_SHARPNESS, SUM_WEIGHT = 8.0, 4.0
# Kinds of word that maps bear: the first ones, colour and form.
KINDS_OF_MAPS = 2


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
    """The tower and both projectors of a model, taught to tell words; everything else of it is left out.

    Args:
        words: for each kind of word (colour, form, …) the words, the first one for what is not there; each must be one
            token. Kinds beyond `KINDS_OF_MAPS` are told once for a shape, at its centre.
    """

    def __init__(self, built: BuiltModel, words: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.tower, self.projector = built.model.vision_tower, built.model.projector
        self.mask_projector = built.model.mask_projector
        self.kinds = list(words)
        for number, embeddings in enumerate(embeddings_of(built, list(words.values()))):
            if number:
                embeddings[0] = 0  # that there is nothing is said once
            self.register_buffer(f"words{number}", embeddings[:, :-NUM_MARKS], persistent=False)

    @property
    def loss_weights(self) -> dict[str, float]:
        """How far tokens and maps are from their sums, where something is shown and elsewhere; the cross entropy of
        each kind of word, in tokens and in maps."""
        weights = dict.fromkeys(("token", "no_token", "map", "no_map"), SUM_WEIGHT)
        return weights | dict.fromkeys((*self.kinds, *self._kinds_of_maps()), 1.0)

    def _kinds_of_maps(self) -> list[str]:
        return [f"map_{kind}" for kind in self.kinds[:KINDS_OF_MAPS]]

    def count_losses(self, labels: torch.Tensor, **_: Any) -> dict[str, float]:
        """The counts `forward` returns: patches. Maps of all scales count."""
        counts: dict[str, float] = {}
        scales = len(self.tower.layer_indices)
        for name, told, times in (("token", at_centres(labels), 1), ("map", labels[:, :KINDS_OF_MAPS], scales)):
            shown, patches = float((told[:, 0] > 0).sum()), float(told[:, 0].numel())
            counts |= {name: shown * times, f"no_{name}": (patches - shown) * times}
            kinds = self.kinds if name == "token" else self._kinds_of_maps()
            counts |= {kind: times * float(_asked(told, number).sum()) for number, kind in enumerate(kinds)}
        return counts

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> PatchReading:
        """Arguments as the fields of `PatchBatch`."""
        size = torch.tensor(pixel_values.shape[-2:], device=pixel_values.device).expand(len(pixel_values), -1)
        features = self.tower(pixel_values, size)
        maps, of_maps = torch.cat([self.mask_projector(f) for f in features]), labels[:, :KINDS_OF_MAPS]
        losses = self._told(self.projector(features[0]), at_centres(labels), "token", self.kinds)
        losses |= self._told(maps, of_maps.repeat(len(features), 1, 1), "map", self._kinds_of_maps())
        counts = self.count_losses(labels)
        return PatchReading({name: LossTerm(term, torch.tensor(counts[name])) for name, term in losses.items()})

    def _told(
        self, vectors: torch.Tensor, labels: torch.Tensor, name: str, kinds: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Sums of the losses of vectors (B, patches, H) that should be the sums of the words `labels` number."""
        vectors = vectors[..., :-NUM_MARKS]
        tables = [self.get_buffer(f"words{number}") for number in range(len(kinds))]
        sums = torch.stack([table[labels[:, number]] for number, table in enumerate(tables)]).sum(dim=0)
        apart, shown = (vectors - sums).square().mean(dim=-1), labels[:, 0] > 0
        losses = {name: apart[shown].sum(), f"no_{name}": apart[~shown].sum()}
        for number, (kind, table) in enumerate(zip(kinds, tables, strict=True)):
            asked = _asked(labels, number)
            scores = vectors[asked] @ table.T / SCORE_SHARPNESS
            losses[kind] = F.cross_entropy(scores, labels[:, number][asked], reduction="sum")
        return losses


def at_centres(labels: torch.Tensor) -> torch.Tensor:
    """(B, kinds, patches) the words of a shape where all its kinds are told, which is at its centre; 0 elsewhere."""
    return labels * (labels > 0).all(dim=1, keepdim=True)


def _asked(labels: torch.Tensor, number: int) -> torch.Tensor:
    """(B, patches) bool. The first kind is asked of all patches, the others where they have a word."""
    return labels[:, number] >= min(number, 1)

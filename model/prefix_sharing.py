"""Conversations about images in one packed sequence: for each image the prefix they share, then the rest of each.

The prefix (system text, the image's positions, equal words) is computed once per image, and padding not
at all. Each conversation sees its image's prefix and itself, and its positions go on from the prefix's end, so
that every state is what it would be in a sequence of its own.

Axes: C conversations, P positions of a sequence of its own, T places of the packed one, N heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .structures import EAGER, SDPA

# Attention implementations that take a mask of which places see which.
PACKING_ATTENTION = (EAGER, SDPA)


@dataclass(frozen=True)
class SharedPrefix:
    """What conversations about an image share, and what follows it in the packed sequence.

    places: how many it has. suffixes: places of each conversation that says more, in order.
    """

    places: int
    suffixes: tuple[int, ...]


@dataclass(frozen=True)
class PackedSequence:
    """How sequences of their own map into the packed one and back.

    sequences, columns: (T,) the place each packed place is taken from; columns are the position ids too. state_index:
    (C, P) where each place has its state; for padding, anywhere. prefixes: in order, one per image. owners: (T,) the
    conversation's number, -1 in a prefix. images: (T,) numbers of the images.
    """

    sequences: torch.Tensor
    columns: torch.Tensor
    state_index: torch.Tensor
    prefixes: tuple[SharedPrefix, ...]
    owners: torch.Tensor
    images: torch.Tensor

    def attention_mask(self) -> torch.Tensor:
        """(1, 1, T, T) bool: which places (the last axis) each place may see."""
        slots = torch.arange(len(self.sequences), device=self.sequences.device)
        visible = (self.owners == -1)[None] | (self.owners[None] == self.owners[:, None])
        same_image = self.images[None] == self.images[:, None]
        return (visible & same_image & (slots[None] <= slots[:, None]))[None, None]

    def make_mask(self, attention: str, dtype: torch.dtype) -> torch.Tensor:
        """What an implementation of PACKING_ATTENTION is to be given as its mask, for states of `dtype`."""
        if attention == SDPA:
            return BlockMask.from_prefixes(self.prefixes, len(self.sequences), self.sequences.device)
        forbidden = ~self.attention_mask()
        return torch.zeros_like(forbidden, dtype=dtype).masked_fill(forbidden, torch.finfo(dtype).min)


def pack_sequences(ids: torch.Tensor, mask: torch.Tensor, image_index: torch.Tensor) -> PackedSequence:
    """Plan a packed sequence.

    Args:
        ids: (C, P) token ids, right-padded. mask: (C, P) bool, True where a position may be attended to; the others
            (padding of an image, too) are left out. image_index: (C,) non-decreasing.
    """
    device = ids.device
    ids, mask, image_index = ids.cpu(), mask.cpu(), image_index.cpu()
    _, image_of_sequence = torch.unique_consecutive(image_index, return_inverse=True)
    first = torch.searchsorted(image_of_sequence, image_of_sequence)
    equal = ((ids == ids[first]) & (mask == mask[first])).long().cumprod(dim=1).sum(dim=1)
    shared = equal.new_zeros(int(image_of_sequence[-1]) + 1).scatter_reduce(
        0, image_of_sequence, equal, "amin", include_self=False
    )
    in_prefix = torch.arange(ids.shape[1])[None] < shared[image_of_sequence][:, None]
    is_first = (torch.arange(len(ids)) == first)[:, None]
    kept = mask & (is_first | ~in_prefix)
    sequences, columns = kept.nonzero(as_tuple=True)
    slots = (kept.flatten().cumsum(dim=0) - 1).clamp(min=0).view_as(kept)
    suffixes = (kept & ~in_prefix).sum(dim=1).tolist()
    prefixes = [
        SharedPrefix(int(places), tuple(suffixes[one] for one in range(start, stop) if suffixes[one]))
        for places, start, stop in _prefix_spans((kept & in_prefix).sum(dim=1), is_first[:, 0])
    ]
    return PackedSequence(
        sequences.to(device),
        columns.to(device),
        torch.where(in_prefix, slots[first], slots).to(device),
        tuple(prefixes),
        torch.where(in_prefix[sequences, columns], -1, sequences).to(device),
        image_of_sequence[sequences].to(device),
    )


def _prefix_spans(places: torch.Tensor, is_first: torch.Tensor) -> list[tuple[int, int, int]]:
    """(places of the prefix, first sequence, sequence after the last) for each image."""
    starts = is_first.nonzero()[:, 0].tolist()
    return [(int(places[a]), a, b) for a, b in zip(starts, [*starts[1:], len(is_first)], strict=True)]


class BlockMask(torch.Tensor):
    """The mask of a packed sequence for `scaled_dot_product_attention`, which then skips pairs that do not meet.

    It has the shape (1, 1, T, T) of the mask that it stands for, and no memory to match.
    """

    prefixes: Sequence[SharedPrefix]
    suffix_masks: Mapping[tuple[int, int], torch.Tensor]

    @classmethod
    def from_prefixes(cls, prefixes: Sequence[SharedPrefix], length: int, device: torch.device) -> BlockMask:
        """For a sequence of `length` places, of which `prefixes` tell all."""
        mask = torch.zeros((), dtype=torch.bool, device=device).expand(1, 1, length, length).as_subclass(cls)
        mask.prefixes = prefixes
        sizes = {(suffix, prefix.places) for prefix in prefixes for suffix in prefix.suffixes}
        mask.suffix_masks = {
            (suffix, places): torch.ones(suffix, places + suffix, dtype=torch.bool, device=device).tril(places)
            for suffix, places in sizes
        }
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend_in_blocks(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def _attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: BlockMask,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of (1, N, T, D) states under a `BlockMask`."""
    if is_causal:
        raise ValueError("a mask is given, and is_causal too: expected one of them")
    sizes = [size for prefix in attn_mask.prefixes for size in (prefix.places, *prefix.suffixes)]
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    found, place = [], 0
    for prefix in attn_mask.prefixes:
        prefix_key, prefix_value = keys[place], values[place]
        if prefix.places:
            found.append(
                F.scaled_dot_product_attention(queries[place], prefix_key, prefix_value, is_causal=True, **options)
            )
        for suffix in prefix.suffixes:
            place += 1
            both = torch.cat([prefix_key, keys[place]], dim=2), torch.cat([prefix_value, values[place]], dim=2)
            own = attn_mask.suffix_masks[suffix, prefix.places]
            found.append(F.scaled_dot_product_attention(queries[place], *both, attn_mask=own, **options))
        place += 1
    return torch.cat(found, dim=2)

"""Conversations about one picture in one row: what they begin with once, the rest of each after it.

The common beginning (system text, the picture's positions, equal words) is computed once per picture. A block mask lets
each conversation see that beginning and itself, and its positions go on from the beginning's end, so that every state
is what it would be in a row of its own.

Axes: C conversations, P positions of a row of its own, R shared rows, M positions of a shared row.
"""

from dataclasses import dataclass

import torch

# Attention implementations that take a mask of our own for every pair of positions.
BLOCK_MASK_ATTENTION = ("eager", "sdpa")


@dataclass
class SharedRows:
    """How rows of their own map into shared ones and back.

    rows, columns: (R, M) the place each shared position is taken from. positions: (R, M) position ids.
    allowed: (R, 1, M, M) bool, query by key. home_rows: (C, 1), home_columns: (C, P) where each place has its state.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor
    allowed: torch.Tensor
    home_rows: torch.Tensor
    home_columns: torch.Tensor


def share_prefixes(ids: torch.Tensor, mask: torch.Tensor, image_index: torch.Tensor) -> SharedRows | None:
    """Plan shared rows, or None where no picture has two conversations.

    Args:
        ids: (C, P) token ids, right-padded. mask: (C, P) bool, True where a position may be attended to; holes (padding
            of the picture) are kept. image_index: (C,) non-decreasing.
    """
    pictures, row_of = torch.unique_consecutive(image_index, return_inverse=True)
    if len(pictures) == len(image_index):
        return None
    device, (count, width) = ids.device, ids.shape
    places = torch.arange(width, device=device)
    lengths = ((places + 1) * mask).amax(dim=1)
    first = torch.searchsorted(row_of, row_of)
    same = (ids == ids[first]) & (mask == mask[first])
    equal = torch.minimum(same.long().cumprod(dim=1).sum(dim=1), lengths)
    prefixes = equal.new_full((len(pictures),), width).scatter_reduce(0, row_of, equal, "amin")
    prefix = prefixes[row_of]
    tails = lengths - prefix
    before = tails.cumsum(0) - tails
    start = prefix + before - before[first]
    within = torch.minimum(places[None], (lengths - 1)[:, None])
    home = torch.where(within < prefix[:, None], within, start[:, None] + within - prefix[:, None])
    used = places[None] < lengths[:, None]
    total = int((start + tails).max())
    shape = (len(pictures), total)
    sources = torch.arange(count, device=device)[:, None].expand(-1, width)[used]
    target = (row_of[sources], home[used])
    rows = torch.zeros(shape, dtype=torch.long, device=device).index_put(target, sources)
    columns = torch.zeros(shape, dtype=torch.long, device=device).index_put(target, within[used])
    # Whose a position is: 0 the common beginning, then the conversation's number from 1; -1 for padding.
    owner = torch.full(shape, -1, device=device).index_put(target, sources + 1)
    slots = torch.arange(total, device=device)
    owner = owner.masked_fill(slots[None] < prefixes[:, None], 0)
    valid = mask[rows, columns] & (owner >= 0)
    visible = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    allowed = visible & valid[:, None, :] & (slots[None, :] <= slots[:, None])
    return SharedRows(rows, columns, columns, allowed[:, None], row_of[:, None], home)

"""The seg codebook: from the hidden states of seg groups to one embedding per target and scale.

Axes: C sequences, T positions, Q targets, S scales, K tokens per scale, H language width, D embedding width.
"""

import torch
from torch import nn


class SegCodebook(nn.Module):
    """An MLP on every token's state, then a weighted sum over the tokens of each scale.

    Args:
        language_width: H. embedding_dim: D. num_scales: S. tokens_per_scale: K.
        fusion_value: where the S x K fusion weights start (or what they are). learned: whether they train (paper) or
            are constants (release).
    """

    def __init__(
        self,
        language_width: int,
        embedding_dim: int,
        num_scales: int,
        tokens_per_scale: int,
        *,
        fusion_value: float,
        learned: bool,
    ) -> None:
        super().__init__()
        self.num_scales, self.tokens_per_scale = num_scales, tokens_per_scale
        self.fusion_value = fusion_value
        self.layers = nn.Sequential(
            nn.Linear(language_width, language_width), nn.ReLU(), nn.Linear(language_width, embedding_dim)
        )
        weights = torch.full((num_scales, tokens_per_scale), fusion_value)
        if learned:
            self.token_weights = nn.Parameter(weights)
        else:
            self.register_buffer("token_weights", weights)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.token_weights, self.fusion_value)

    def forward(self, group_states: torch.Tensor) -> torch.Tensor:
        """(Q, S * K, H) states that predict a group's tokens, in order -> (Q, S, D) embeddings."""
        embedded_QGD = self.layers(group_states)
        embedded_QSKD = embedded_QGD.unflatten(1, (self.num_scales, self.tokens_per_scale))
        return (embedded_QSKD * self.token_weights[None, :, :, None]).sum(dim=2)


def group_positions(
    ids: torch.Tensor, seg_token_ids: list[int], *, adjacent: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the seg groups of a batch are; only membership in the set of seg ids counts (docs/facts.md, M3).

    Args:
        ids: (C, T). adjacent: False (release) lets words stand between the tokens of a group.

    Returns:
        sequences (Q,), and columns (Q, S * K) of the tokens, in reading order.

    Raises:
        ValueError: a sequence holds seg tokens that do not form whole groups (of adjacent tokens, if asked for).
    """
    size = len(seg_token_ids)
    is_seg = torch.isin(ids, torch.tensor(seg_token_ids, device=ids.device))
    sequences, columns = is_seg.nonzero(as_tuple=True)
    if sequences.numel() % size == 0:
        sequences_QG, columns_QG = sequences.view(-1, size), columns.view(-1, size)
        whole = sequences_QG == sequences_QG[:, :1]
        if adjacent:
            whole &= columns_QG == columns_QG[:, :1] + torch.arange(size, device=ids.device)
        if bool(whole.all()):
            return sequences_QG[:, 0], columns_QG
    counts = is_seg.sum(dim=1).tolist()
    raise ValueError(
        f"seg tokens per sequence are {counts}, not whole groups of {size}{' adjacent' if adjacent else ''} tokens: a "
        "group was cut or broken before it reached the model"
    )


def whole_groups(ids: list[int], seg_token_ids: list[int]) -> tuple[list[int], int]:
    """Whole seg groups in a generated answer.

    Returns:
        The index of the first token of each whole group, and the number of broken ones: runs of seg tokens whose length
        is not a multiple of the group size. Of a run that is too long the whole groups at its beginning are kept.
    """
    members, size = set(seg_token_ids), len(seg_token_ids)
    starts: list[int] = []
    broken, position = 0, 0
    while position < len(ids):
        if ids[position] not in members:
            position += 1
            continue
        end = position
        while end < len(ids) and ids[end] in members:
            end += 1
        starts.extend(range(position, end - size + 1, size))
        broken += int((end - position) % size != 0)
        position = end
    return starts, broken


def release_groups(ids: list[int], seg_token_ids: list[int]) -> tuple[list[list[int]], int]:
    """The groups of a text as the release counts them when it generates (docs/facts.md, M3, E3).

    Returns:
        The places of each group's tokens: any S * K seg tokens in order, whatever stands between them. No group at all
        where their number is no multiple of S * K. And the number of broken groups: 1 then, else 0.
    """
    members, size = set(seg_token_ids), len(seg_token_ids)
    places = [place for place, token in enumerate(ids) if token in members]
    if len(places) % size:
        return [], 1
    return [places[start : start + size] for start in range(0, len(places), size)], 0

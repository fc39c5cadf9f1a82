"""Where the mask parts of a tiny model start: at the words that its patches and its answers are already about.

A query finds its map by a product of the two. From random weights neither side has a reason to turn towards the other
before the other has, and a mask of every shape is where that leaves training for hundreds of steps. Here both start in
one space: maps are the image tokens less their mark, which are sums of words (`PatchReader`), and the codebook reads
off a group's states the words that name its target. No mask is looked at.

Axes: Q targets, S scales, K tokens per scale, H language width, D embedding width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from demo.tiny import NUM_MARKS, without_marks, word_id
from model.modeling_pixellm import PixelLMForCausalLM
from model.pixel_decoder import Attention, PixelDecoder, TwoWayLayer
from model.seg_codebook import SegCodebook, group_positions
from utils.checkpoints.builder import BuiltModel

READING_STEPS, READING_BATCH, READING_RATE = 600, 256, 5e-3
# Weights of a convolution's neighbours at the start, relative to what they would have been.
NEIGHBOUR_SHARE = 0.3


@torch.no_grad()
def start_masks_at_words(built: BuiltModel, examples: Iterable[tuple[dict[str, Any], Sequence[str]]]) -> float:
    """Give a model with a trained projector mask parts that match words.

    Args:
        examples: (arguments of forward, the words that name each target in the order of its groups); each word must be
            one token.

    Returns:
        How much of the words the codebook reads: the share of variance explained, averaged over the scales.

    Raises:
        BuildError: a word is not one token.
    """
    model, config = built.model, built.model.config
    width, depth = config.text_config.hidden_size, config.embedding_dim
    model.mask_projector.load_state_dict(model.projector.state_dict())
    cast(nn.Linear, model.mask_projector.layers[2]).bias[-NUM_MARKS:] = 0
    shared = _rotation(width)[:depth] * (width / depth) ** 0.5  # (D, H)
    _read_maps(model.pixel_decoder, shared)
    _match(model.pixel_decoder)
    states, meant = [], []
    for arguments, names in examples:
        states.append(_group_states(model, arguments))
        meant += [_meaning(built, name) for name in names]
    return _read_words(model.codebook, torch.cat(states), torch.stack(meant) @ shared.T)


def _rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _group_states(model: PixelLMForCausalLM, arguments: dict[str, Any]) -> torch.Tensor:
    """(Q, S * K, H) states that predict the groups' tokens."""
    images = model.encode_images(arguments["pixel_values"], arguments["resized_sizes"])
    image_index = arguments["image_index"]
    rows = model.merge_multimodal_embeddings(arguments["input_ids"], arguments["attention_mask"], images, image_index)
    group_rows, group_columns = group_positions(rows.ids, model.config.seg_token_ids)
    return model.hidden_states(rows, image_index)[group_rows[:, None], group_columns - 1]


def _meaning(built: BuiltModel, name: str) -> torch.Tensor:
    """(H,) sum of the embeddings of a name's words, less the mark of words."""
    ids = [word_id(built.processor, word) for word in name.split()]
    return without_marks(built.model.get_input_embeddings().weight[ids].sum(dim=0))


def _read_maps(decoder: PixelDecoder, shared: torch.Tensor) -> None:
    """Let the neck project maps by `shared` (D, H) and hardly mix neighbours."""
    first, mixing = (cast(nn.Conv2d, decoder.neck[place]) for place in (0, 2))
    first.weight.copy_(shared[:, :, None, None])
    mixing.weight.mul_(NEIGHBOUR_SHARE)
    mixing.weight[:, :, 1, 1] += torch.eye(len(shared))


def _match(decoder: PixelDecoder) -> None:
    """Let tokens and patches look where they find their like, and tokens keep what they are."""
    for layer in decoder.modules():
        if isinstance(layer, TwoWayLayer):
            for attention in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token, layer.self_attn):
                _look_at_like(attention)
            for projection in (layer.self_attn.v_proj, layer.self_attn.out_proj):
                projection.weight.copy_(torch.eye(len(projection.weight)))


def _look_at_like(attention: Attention) -> None:
    query, key = attention.q_proj, attention.k_proj
    query.weight.copy_(_rotation(query.in_features)[: query.out_features])
    key.weight.copy_(query.weight)
    nn.init.zeros_(query.bias)
    nn.init.zeros_(key.bias)


def _read_words(codebook: SegCodebook, states: torch.Tensor, wanted: torch.Tensor) -> float:
    """Train the codebook to turn states (Q, S * K, H) into `wanted` (Q, D), the same at all scales.

    Embeddings come out with mean 0 and rms 1 as far as they are read; what is read on the last fifth of the targets,
    which is not trained on, is returned.
    """
    wanted = wanted - wanted.mean(0)
    wanted = wanted / wanted.square().mean().sqrt()
    known = len(states) * 4 // 5
    codebook.requires_grad_(True)
    optimizer = torch.optim.AdamW(codebook.parameters(), lr=READING_RATE, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(READING_STEPS):
            optimizer.param_groups[0]["lr"] = READING_RATE * (1 - step / READING_STEPS)
            chosen = torch.randint(known, (READING_BATCH,))
            loss = F.mse_loss(codebook(states[chosen]), wanted[chosen, None].expand(-1, codebook.num_scales, -1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    missed = (codebook(states[known:]) - wanted[known:, None]).square().mean()
    return float(1 - missed / wanted[known:].square().mean())

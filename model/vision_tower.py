"""Image -> feature maps at the chosen layers, for CLIP and SigLIP towers.

Axes: B images, N patches, C vision width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from .geometry import valid_cells

SUPPORTED_TOWERS = ("clip_vision_model", "siglip_vision_model")


def vision_model_from_config(config: PretrainedConfig, requested_attention: str | None) -> PreTrainedModel:
    """A randomly initialised tower.

    Padded patches are masked as attention keys, which flash attention cannot do: where it is requested for the language
    model the tower uses sdpa.
    """
    if config.model_type not in SUPPORTED_TOWERS:
        raise ValueError(
            f"vision tower of type {config.model_type!r} is not supported: expected one of "
            f"{', '.join(SUPPORTED_TOWERS)}"
        )
    implementation = "eager" if requested_attention == "eager" else "sdpa"
    return AutoModel.from_config(config, attn_implementation=implementation)


class VisionTower(nn.Module):
    """A transformers vision model read at some of its hidden states, with the padding of the square masked.

    Args:
        model: a CLIP or SigLIP vision model whose config's `image_size` is the side of the square.
        layers: hidden states to return, one per scale, counted like transformers' `hidden_states`.
    """

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        super().__init__()
        config = model.config
        depth = config.num_hidden_layers
        self.layer_indices = [layer if layer >= 0 else depth + 1 + layer for layer in layers]
        if any(not 0 <= index <= depth for index in self.layer_indices):
            raise ValueError(
                f"vision_feature_layers {list(layers)} do not exist in a tower of {depth} layers (hidden states 0 to "
                f"{depth}); "
                "choose others in the config"
            )
        self.model = model
        self.grid_size = config.image_size // config.patch_size
        self.patch_size = config.patch_size

    def parts_without_loss(self) -> list[nn.Module]:
        """Layers after the last hidden state that is read."""
        after = list(self.model.encoder.layers[max(self.layer_indices) :])
        return after + [getattr(self.model, name) for name in ("post_layernorm", "head") if hasattr(self.model, name)]

    @property
    def num_class_tokens(self) -> int:
        """Positions before the first patch: one in CLIP, none in SigLIP."""
        return int(hasattr(self.model.embeddings, "class_embedding"))

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def patch_mask(self, resized_sizes: torch.Tensor) -> torch.Tensor:
        """(B, class tokens + N) bool: which positions may be attended to."""
        patches = valid_cells(resized_sizes, self.grid_size, self.patch_size)
        return F.pad(patches, (self.num_class_tokens, 0), value=True)

    def hidden_states(
        self, pixel_values: torch.Tensor, resized_sizes: torch.Tensor, layers: list[int]
    ) -> list[torch.Tensor]:
        """The hidden states `layers` (non-negative), each (B, class tokens + N, C)."""
        model = self.model
        states = model.embeddings(pixel_values)
        if hasattr(model, "pre_layrnorm"):
            states = model.pre_layrnorm(states)
        mask_BN = self.patch_mask(resized_sizes.to(states.device))
        bias = None
        if not bool(mask_BN.all()):
            bias = torch.zeros(mask_BN.shape, dtype=states.dtype, device=states.device)
            bias = bias.masked_fill(~mask_BN, torch.finfo(states.dtype).min)[:, None, None, :].expand(
                -1, -1, mask_BN.shape[1], -1
            )
        found = {0: states}
        for number, layer in enumerate(model.encoder.layers[: max(layers)], start=1):
            states = layer(states, attention_mask=bias)
            if number in layers:
                found[number] = states
        return [found[layer] for layer in layers]

    def forward(self, pixel_values: torch.Tensor, resized_sizes: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the square, one per scale.

        Args:
            pixel_values: (B, 3, P, P), normalised. resized_sizes: (B, 2) sizes of the images inside the square.

        Returns:
            For each scale (B, N, C) features of the patches in row-major order, the class token dropped. A frozen tower
            runs without gradient.
        """
        dtype = self.model.embeddings.patch_embedding.weight.dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            states = self.hidden_states(pixel_values.to(dtype), resized_sizes, self.layer_indices)
        return [state[:, self.num_class_tokens :] for state in states]


def resize_position_table(table: torch.Tensor, grid: int, class_tokens: int, method: str) -> torch.Tensor:
    """A tower's position table, brought from its own square grid to one of `grid` x `grid`.

    Args:
        table: (class tokens + n * n, C), the class row first, as CLIP stores it.
        method: "standard" resizes the patch rows bicubically and keeps the class row. "release" reproduces the
            published model (docs/facts.md, M6): it takes the last row for the class row, resizes the others bilinearly,
            and puts the last row at the end.

    Returns:
        (class tokens + grid * grid, C).
    """
    own_grid = math.isqrt(table.shape[0] - class_tokens)
    if own_grid**2 + class_tokens != table.shape[0]:
        raise ValueError(
            f"a position table of {table.shape[0]} rows is not {class_tokens} class row(s) and a square grid"
        )
    if own_grid == grid:
        return table
    release = method == "release"
    rows = own_grid**2
    first = 0 if release else class_tokens
    square = table[first : first + rows].T.reshape(1, -1, own_grid, own_grid).float()
    resized = F.interpolate(square, (grid, grid), mode="bilinear" if release else "bicubic", align_corners=False)
    patches = resized[0].flatten(1).T.to(table.dtype)
    kept = (patches, table[rows:]) if release else (table[:class_tokens], patches)
    return torch.cat(kept)

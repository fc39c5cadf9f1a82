"""The pixel decoder: (embeddings, feature maps) -> mask logits, coarse to fine.

Every mask head has this interface: `forward(embeddings_QSD, maps_SBHhw, image_of_target_Q) -> mask_logits_Qhw`, and
for answering `prepare(maps)`, once per image, and `decode_in_chunks(embeddings, prepared, image_of_target)`.
Axes: B images, Q targets, S scales, D decoder width, N map positions, T decoder tokens, h w map sides.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-6
# Targets decoded together without gradients; each needs some ten copies of the finest map (4 MB in float32 for the
# release's shape). On a CPU more than two do not stay in its caches: 12 of them took 1.2 s by twos, 1.8 s at once.
TARGETS_AT_ONCE = {"cpu": 2}
TARGETS_AT_ONCE_ELSEWHERE = 16


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, h, w) maps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Linear layers with ReLU between them: `width` wide inside, `depth` layers."""

    def __init__(self, in_width: int, width: int, out_width: int, depth: int) -> None:
        super().__init__()
        widths = [in_width] + [width] * (depth - 1) + [out_width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            states = F.relu(layer(states))
        return self.layers[-1](states)


class FourierPositions(nn.Module):
    """Positions of a square grid through random frequencies: (x, y) -> (sin, cos) of D / 2 of them.

    The frequencies are a buffer and part of the checkpoint, because a decoder only works with those it was trained
    with.
    """

    frequencies: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(2, width // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.frequencies)

    def forward(self, side: int) -> torch.Tensor:
        """(side * side, D) encodings of the cell centres in row-major order, computed in float32."""
        centres = (torch.arange(side, device=self.frequencies.device, dtype=torch.float32) + 0.5) / side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        points = torch.stack([columns, rows], dim=-1).flatten(0, 1)
        phases = 2 * math.pi * ((2 * points - 1) @ self.frequencies.float())
        return torch.cat([phases.sin(), phases.cos()], dim=-1).to(self.frequencies.dtype)


class Attention(nn.Module):
    """Multi-head attention whose inner width is `width / shrink`."""

    def __init__(self, width: int, num_heads: int, shrink: int = 1) -> None:
        super().__init__()
        inner = width // shrink
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(Q, Tq, D), (Q, Tk, D), (Q, Tk, D) -> (Q, Tq, D). What is the same for all targets may come once, as 1."""
        targets = max(len(query), len(key), len(value))
        q, k, v = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).expand(targets, -1, -1, -1)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwoWayLayer(nn.Module):
    """Tokens attend to each other, then to the map; an MLP; then the map attends to the tokens.

    Args:
        first: in the first layer the tokens are their own positions, so the self-attention replaces them and adds none.
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, num_heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, num_heads, shrink=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_width, width, depth=2)
        self.norm3 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, num_heads, shrink=2)
        self.norm4 = nn.LayerNorm(width)

    def forward(
        self, tokens: torch.Tensor, maps: torch.Tensor, token_positions: torch.Tensor, map_positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            query = tokens + token_positions
            tokens = tokens + self.self_attn(query, query, tokens)
        tokens = self.norm1(tokens)
        placed_maps = maps + map_positions
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_positions, placed_maps, maps))
        tokens = self.norm3(tokens + self.mlp(tokens))
        maps = self.norm4(maps + self.cross_attn_image_to_token(placed_maps, tokens + token_positions, tokens))
        return tokens, maps


class TwoWayTransformer(nn.Module):
    """`depth` two-way layers and a last look of the tokens at the map."""

    def __init__(self, depth: int, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayLayer(width, num_heads, mlp_width, first=index == 0) for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(width, num_heads, shrink=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(
        self, tokens: torch.Tensor, maps: torch.Tensor, map_positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q, T, D) tokens, (Q or 1, N, D) maps, (N, D) positions -> (Q, T, D), (Q, N, D)."""
        token_positions = tokens
        for layer in self.layers:
            tokens, maps = layer(tokens, maps, token_positions, map_positions)
        attended = self.final_attn_token_to_image(tokens + token_positions, maps + map_positions, maps)
        return self.norm_final_attn(tokens + attended), maps


class PixelDecoder(nn.Module):
    """One mask per target, decoded scale after scale, each scale looking where the one before it found something.

    Args:
        language_width: channels of the feature maps handed in.
        width: D, also the codebook's embedding width.
        num_scales: S. depth, num_heads, mlp_width: of the two-way transformer of each scale.
        num_mask_tokens: mask tokens per target; the first makes the mask, the others and the IoU token exist because
            published checkpoints have them.
        scale_value: start (or value) of the S weights of the scales' masks. learned: whether these train.
    """

    def __init__(
        self,
        language_width: int,
        width: int,
        num_scales: int,
        *,
        depth: int,
        num_heads: int,
        mlp_width: int,
        num_mask_tokens: int,
        scale_value: float,
        learned: bool,
    ) -> None:
        super().__init__()
        self.num_scales, self.scale_value = num_scales, scale_value
        self.neck = nn.Sequential(
            nn.Conv2d(language_width, width, kernel_size=1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(width),
        )
        self.no_mask_embed = nn.Embedding(1, width)
        self.positions = nn.ModuleList(FourierPositions(width) for _ in range(num_scales))
        self.level_embed = nn.Embedding(num_scales, width)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(num_mask_tokens, width)
        self.transformers = nn.ModuleList(
            TwoWayTransformer(depth, width, num_heads, mlp_width) for _ in range(num_scales)
        )
        self.map_upscaling = nn.Sequential(nn.ConvTranspose2d(width, width, 2, stride=2), LayerNorm2d(width), nn.GELU())
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 8, 2, stride=2), LayerNorm2d(width // 8), nn.GELU()
        )
        self.hypernetworks = nn.ModuleList(MLP(width, width, width // 8, depth=3) for _ in range(num_mask_tokens))
        self.iou_head = MLP(width, width, num_mask_tokens, depth=3)
        weights = torch.full((num_scales,), scale_value)
        if learned:
            self.scale_weights = nn.Parameter(weights)
        else:
            self.register_buffer("scale_weights", weights)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale_weights, self.scale_value)

    def parts_without_loss(self) -> list[nn.Module]:
        """Modules that no loss reaches: kept for published checkpoints, frozen in training."""
        unused = [self.map_upscaling] if self.num_scales == 1 else []  # it brings maps to finer scales
        return [self.iou_head, *self.hypernetworks[1:], *unused]

    def scale_map(self, maps: torch.Tensor, scale: int) -> torch.Tensor:
        """(B, language width, h, w) -> (B, D, h * 2^scale, w * 2^scale): the neck, an upscaling per finer scale."""
        maps = self.neck(maps)
        for _ in range(scale):
            maps = self.map_upscaling(maps)
        return maps

    def decode_scale(
        self, embeddings_QD: torch.Tensor, maps_QDhw: torch.Tensor, scale: int, num_masks: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of one scale.

        Args:
            embeddings_QD: this scale's embedding of each target. maps_QDhw: this scale's map for each target, or one
                for all of them.
            num_masks: how many of the mask tokens to turn into masks.

        Returns:
            (Q, num_masks, 2h, 2w) logits, and the (Q, T, D) tokens after the transformer: IoU token, mask tokens,
            target.
        """
        learned = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat(
            [learned.expand(len(embeddings_QD), -1, -1), embeddings_QD[:, None].to(learned.dtype)], dim=1
        )
        tokens = tokens + self.level_embed.weight[scale]
        side = maps_QDhw.shape[-1]
        states = maps_QDhw.flatten(2).transpose(1, 2) + self.no_mask_embed.weight[0]
        tokens, states = self.transformers[scale](tokens, states, self.positions[scale](side))
        upscaled = self.output_upscaling(states.transpose(1, 2).unflatten(2, (side, side)))
        kernels = torch.stack([self.hypernetworks[mask](tokens[:, 1 + mask]) for mask in range(num_masks)], dim=1)
        return torch.einsum("qmc,qchw->qmhw", kernels, upscaled), tokens

    def fuse(self, scale_masks: list[torch.Tensor]) -> torch.Tensor:
        """Masks of all scales, coarse to fine, each (Q, h, w) -> (Q, h, w) at the finest size, weighted and summed."""
        size = scale_masks[-1].shape[-2:]
        fused = scale_masks[-1] * self.scale_weights[-1]
        for mask, weight in zip(scale_masks[:-1], self.scale_weights, strict=False):
            resized = F.interpolate(mask[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
            fused = fused + resized.to(mask.dtype) * weight
        return fused

    def prepare(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """What does not depend on targets: S maps (B, language width, h, w) -> S maps (B, D, h * 2^s, w * 2^s)."""
        return [self.scale_map(one, scale) for scale, one in enumerate(maps)]

    def decode(
        self, embeddings: torch.Tensor, prepared: list[torch.Tensor], image_of_target: torch.Tensor
    ) -> torch.Tensor:
        """Decode targets together.

        Args:
            embeddings: (Q, S, D). prepared: what `prepare` made. image_of_target: (Q,) long, or (1,) where all
                targets are of one image, whose maps are then not copied for each.

        Returns:
            (Q, h * 2^S, w * 2^S) mask logits over the whole square.
        """
        masks: list[torch.Tensor] = []
        for scale in range(self.num_scales):
            target_maps = prepared[scale][image_of_target]
            if masks:
                target_maps = target_maps * (1 + masks[-1].sigmoid())[:, None]
            logits, _ = self.decode_scale(embeddings[:, scale], target_maps, scale)
            masks.append(logits[:, 0])
        return self.fuse(masks)

    def decode_in_chunks(
        self, embeddings: torch.Tensor, prepared: list[torch.Tensor], image_of_target: torch.Tensor
    ) -> torch.Tensor:
        """`decode` for any number of targets in bounded memory; not for training, which keeps everything anyway."""
        size = TARGETS_AT_ONCE.get(embeddings.device.type, TARGETS_AT_ONCE_ELSEWHERE)
        parts = []
        chunks = zip(embeddings.split(size), image_of_target.split(size), strict=True)
        for some, images in chunks:
            alike = bool((images == images[0]).all())
            parts.append(self.decode(some, prepared, images[:1] if alike else images))
        return torch.cat(parts)

    def forward(
        self, embeddings: torch.Tensor, maps: list[torch.Tensor], image_of_target: torch.Tensor
    ) -> torch.Tensor:
        """Decode all targets of all images.

        Args:
            embeddings: (Q, S, D), Q at least 1. maps: S maps (B, language width, h, w), all of one size.
            image_of_target: (Q,) long.

        Returns:
            (Q, h * 2^S, w * 2^S) mask logits over the whole square.
        """
        decode = self.decode if torch.is_grad_enabled() else self.decode_in_chunks
        return decode(embeddings, self.prepare(maps), image_of_target)

"""Losses as pure functions that return a sum and a count, so that the engine can normalise over a whole step.

Axes: Q targets, H W pixels. A pixel labelled IGNORE_LABEL takes no part in any mask loss.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .structures import IGNORE_LABEL

# The release divides both factors by 1000 and adds 1e-6 (docs/facts.md, L1), which together smooths by 1e-3 pixels.
DICE_SCALE, DICE_EPS = 1000.0, 1e-6


class LossTerm(NamedTuple):
    """A loss before normalisation: `sum` over `count` items (labelled tokens, or masks with a labelled pixel)."""

    sum: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # a tuple's own count() is not missed


def text_loss(logits: torch.Tensor, labels: torch.Tensor) -> LossTerm:
    """Cross entropy of (n, vocabulary) logits against (n,) token ids, all of them counted."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return LossTerm(total, torch.tensor(float(labels.numel()), device=logits.device))


def valid_pixels(masks: torch.Tensor) -> torch.Tensor:
    """(Q, H, W) bool: pixels that take part in mask losses."""
    return masks != IGNORE_LABEL


def count_masks(masks: torch.Tensor) -> torch.Tensor:
    """Number of masks with at least one labelled pixel."""
    return valid_pixels(masks).flatten(1).any(dim=1).sum()


@torch.no_grad()
def refinement_weights(mask_logits: torch.Tensor, questions: torch.Tensor, alpha: float) -> torch.Tensor:
    """Target refinement: weight `alpha` where two or more masks predicted for the same question are positive, else 1.

    Args:
        mask_logits: (Q, H, W). questions: (Q,) any integers; equal numbers belong to one question.

    Returns:
        (Q, H, W) float32, without gradient.
    """
    numbers, question_of = torch.unique(questions, return_inverse=True)
    positive = (mask_logits > 0).float()
    count = positive.new_zeros((len(numbers), *mask_logits.shape[1:])).index_add_(0, question_of, positive)
    return 1.0 + (alpha - 1.0) * (count >= 2).float()[question_of]


def bce_loss(mask_logits: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor | None = None) -> LossTerm:
    """Binary cross entropy: the mean over a mask's labelled pixels, summed over masks.

    Args:
        mask_logits: (Q, H, W). masks: (Q, H, W) of 0, 1 and IGNORE_LABEL. weights: (Q, H, W) per pixel, default 1.
    """
    valid = valid_pixels(masks)
    target = masks.float().masked_fill(~valid, 0.0)
    pixel = F.binary_cross_entropy_with_logits(mask_logits.float(), target, weight=weights, reduction="none")
    per_mask = (pixel * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)
    return LossTerm(per_mask.sum(), count_masks(masks).float())


def dice_loss(mask_logits: torch.Tensor, masks: torch.Tensor) -> LossTerm:
    """DICE: 1 - 2|p·t| / (|p| + |t|) per mask over its labelled pixels, summed over masks. Shapes as in `bce_loss`."""
    valid = valid_pixels(masks)
    probability = (mask_logits.float().sigmoid() * valid).flatten(1)
    target = masks.float().masked_fill(~valid, 0.0).flatten(1)
    overlap = 2 * (probability / DICE_SCALE * target).sum(1)
    size = (probability / DICE_SCALE).sum(1) + (target / DICE_SCALE).sum(1)
    per_mask = 1 - (overlap + DICE_EPS) / (size + DICE_EPS)
    counted = valid.flatten(1).any(dim=1)
    return LossTerm((per_mask * counted).sum(), counted.sum().float())

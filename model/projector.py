"""Vision width -> language width."""

import torch
from torch import nn


class Projector(nn.Module):
    """Two linear layers with a GELU between; used once for image tokens and once for the pixel decoder's maps.

    Args:
        vision_width: width of the vision tower's features.
        language_width: width of the language model; the hidden layer is twice as wide.
    """

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(vision_width, 2 * language_width),
            nn.GELU(),
            nn.Linear(2 * language_width, language_width),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., vision width) -> (..., language width)."""
        return self.layers(features)

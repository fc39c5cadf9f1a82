"""Where an image sits inside the square the vision tower sees, and the way back for masks.

An image is resized so that its longest side fills the square and is put into the square's top left corner. Every
size here is (height, width) in pixels.
"""

import torch
import torch.nn.functional as F


def resized_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """Size of an image after its longest side was brought to `side`.

    Halves are rounded up, as the release does. The release lets the short side of an extreme image become 0; here it
    is at least 1, so that every image can be encoded.
    """
    if min(height, width, side) < 1:
        raise ValueError(
            f"cannot resize an image of {height}x{width} pixels to a longest side of {side}: all must be at least 1"
        )
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def valid_cells(resized_sizes: torch.Tensor, grid: int, cell: int) -> torch.Tensor:
    """Which cells of a grid over the square hold any of the image (docs/facts.md, M7).

    Args:
        resized_sizes: (B, 2) sizes of the images inside the square.
        grid: cells per side. cell: pixels per cell.

    Returns:
        (B, grid * grid) bool, row-major: cell (r, c) is valid iff r * cell < height and c * cell < width.
    """
    starts = torch.arange(grid, device=resized_sizes.device) * cell
    rows_BR = starts[None, :] < resized_sizes[:, :1]
    columns_BC = starts[None, :] < resized_sizes[:, 1:]
    return (rows_BR[:, :, None] & columns_BC[:, None, :]).flatten(1)


def restore_masks(
    mask_logits: torch.Tensor, resized_size: tuple[int, int], original_size: tuple[int, int]
) -> torch.Tensor:
    """Bring mask logits from the decoder's square to the image's own pixels (docs/facts.md, M11).

    Args:
        mask_logits: (Q, h, w), any float type.
        resized_size: the image's size inside the square, whose side is the longer of the two.
        original_size: the image's own size.

    Returns:
        (Q, H, W) float32 logits at `original_size`: bilinear, corners not aligned, no antialiasing.
    """
    if mask_logits.shape[0] == 0:
        return mask_logits.new_zeros((0, *original_size), dtype=torch.float32)
    height, width = resized_size
    side = max(height, width)
    square = F.interpolate(mask_logits.float()[:, None], (side, side), mode="bilinear", align_corners=False)
    image = square[..., :height, :width]
    return F.interpolate(image, tuple(original_size), mode="bilinear", align_corners=False)[:, 0]

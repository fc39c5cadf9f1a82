"""The pixel decoder: the same masks however many targets are decoded at once, and whether maps are copied or shared."""

import pytest
import torch

from model import pixel_decoder
from model.pixel_decoder import PixelDecoder

# Of width 16 the last norm has two channels, which makes of a difference in rounding one in sign.
SIDE, WIDTH = 4, 32


def make(num_scales: int = 2) -> PixelDecoder:
    torch.manual_seed(0)
    return PixelDecoder(
        12,
        WIDTH,
        num_scales,
        depth=2,
        num_heads=2,
        mlp_width=16,
        num_mask_tokens=4,
        scale_value=0.5,
        learned=False,
    ).eval()


def inputs(targets: int, images: int, num_scales: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(images, 12, SIDE, SIDE, generator=generator) for _ in range(num_scales)]
    return torch.randn(targets, num_scales, WIDTH, generator=generator), maps


@pytest.mark.parametrize("num_scales", [1, 2, 3])
@pytest.mark.parametrize("images", [[0], [0, 0, 0, 0, 0], [2, 0, 0, 1, 1, 1, 1], [1] * 34])
def test_chunks_are_the_whole(images: list[int], num_scales: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make(num_scales)
    embeddings, maps = inputs(len(images), 3, num_scales)
    owners = torch.tensor(images)
    whole = decoder(embeddings, maps, owners)
    assert whole.requires_grad and whole.shape == (len(images), SIDE * 2**num_scales, SIDE * 2**num_scales)
    for size in (1, 2, 3, 50):
        monkeypatch.setattr(pixel_decoder, "TARGETS_AT_ONCE", {"cpu": size})
        with torch.no_grad():
            chunked = decoder(embeddings, maps, owners)
        assert torch.allclose(chunked, whole, atol=1e-5 * float(whole.detach().abs().max()))


def test_no_more_targets_than_allowed_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory grows with the chunk only: what a pass through a transformer is given, its maps above all."""
    decoder, sizes = make(), []
    for transformer in decoder.transformers:
        transformer.register_forward_pre_hook(lambda module, given: sizes.append((len(given[0]), len(given[1]))))
    embeddings, maps = inputs(34, 2)
    monkeypatch.setattr(pixel_decoder, "TARGETS_AT_ONCE", {"cpu": 4})
    with torch.no_grad():
        decoder(embeddings, maps, torch.tensor([0] * 18 + [1] * 16))
    # 34 = 8 x 4 + 2. One image's map is there once at the first scale, and for each target at the next; the fifth
    # chunk (targets 16 to 19) holds targets of both images.
    assert sizes == [pair for chunk in range(8) for pair in ((4, 4 if chunk == 4 else 1), (4, 4))] + [(2, 1), (2, 2)]


def test_one_map_for_all_targets_is_as_good_as_copies() -> None:
    decoder = make()
    embeddings, maps = inputs(5, 1)
    with torch.no_grad():
        prepared = decoder.prepare(maps)
        shared = decoder.decode(embeddings, prepared, torch.zeros(1, dtype=torch.long))
        copied = decoder.decode(embeddings, prepared, torch.zeros(5, dtype=torch.long))
    assert torch.allclose(shared, copied, atol=1e-6)

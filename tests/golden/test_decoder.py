"""Golden group `decoder`: codebook MLP, neck, positions and both levels of the pixel decoder."""

from typing import Any

import pytest
import torch

from tests.golden import recipe, released_model, vectors

FUSED_STRIDE = 2  # at which the layout keeps the fused mask of several targets


def test_decoder() -> None:
    model = released_model.build()
    decoder = model.pixel_decoder
    with torch.no_grad(), vectors.read_group("decoder") as golden:
        facts = golden.facts
        seed = facts["seed"]
        states = recipe.make_tensor(seed, **facts["hidden_states"].read_all())
        golden.close("text_hidden_fcs_out", model.codebook.layers(states), atol=vectors.HIDDEN_ATOL)
        golden.check(
            bool((model.codebook.token_weights == facts["multiseg_scalar"]).all()),
            f"token fusion {model.codebook.token_weights.tolist()}, expected {facts['multiseg_scalar']} throughout",
        )
        golden.same("multiseg_scalar_count", model.config.group_size, facts["multiseg_scalar_count"])
        golden.same("multiscale_scalar", decoder.scale_weights.tolist(), facts["multiscale_scalar"])

        maps = recipe.make_tensor(seed, **facts["image_features"].read_all())
        for name in golden.names(r"^image_feature_neck_out"):  # large: a trimmed set may lack it
            golden.close(name, vectors.thin_out(decoder.neck(maps), *vectors.strides(name)), atol=vectors.HIDDEN_ATOL)
        for level in range(decoder.num_scales):
            (name,) = golden.names(rf"^dense_pe_level{level}_")
            golden.close(
                name, positions_like(golden.tensor(name), level, maps.shape[-1], name), atol=vectors.HIDDEN_ATOL
            )

        embeddings_entry = facts["pred_embeddings_N"].read_all()
        for count in sorted({int(name.split(".")[0][1:]) for name in golden.names(r"^n\d+\.")}):
            compare_targets(golden, count, embeddings(seed, embeddings_entry, count), maps)


def positions_like(stored: torch.Tensor, level: int, side: int, name: str) -> torch.Tensor:
    """Position encodings of a level as a (C, H, W) map, thinned as `name` tells, with the leading axes of `stored`."""
    side *= 2**level
    encodings = released_model.build().pixel_decoder.positions[level](side)
    thinned = vectors.thin_out(encodings.T.unflatten(1, (side, side)), *vectors.strides(name))
    return thinned.reshape((1,) * (stored.dim() - thinned.dim()) + thinned.shape)


def embeddings(seed: int, entry: dict[str, Any], count: int) -> torch.Tensor:
    """(N, S, D) recipe embeddings; the recipe's name and shape are given for any N."""
    shape = [count if size == "N" else size for size in entry["shape"]]
    return recipe.make_tensor(seed, entry["name"].replace("{N}", str(count)), shape, entry["center"], entry["scale"])


def compare_targets(golden: vectors.Reading, count: int, target_embeddings: torch.Tensor, maps: torch.Tensor) -> None:
    """All that is stored of `count` targets: their masks and IoU estimates at each level, and the fused mask."""
    decoder = released_model.build().pixel_decoder
    # Of each level and group of targets that are decoded together: the mask tokens' masks, and their IoU estimates.
    levels: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(decoder.num_scales)]
    decode_scale = decoder.decode_scale

    def decode_all(
        embeddings_QD: torch.Tensor, maps_QDhw: torch.Tensor, scale: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        masks, tokens = decode_scale(embeddings_QD, maps_QDhw, scale, num_masks=len(decoder.hypernetworks))
        levels[scale].append((masks, decoder.iou_head(tokens[:, 0])))
        return masks, tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "decode_scale", decode_all)
        image_of_target = torch.zeros(count, dtype=torch.long)
        fused = decoder(target_embeddings, [feature[None] for feature in maps], image_of_target)

    for level, groups in enumerate(levels):
        masks, ious = (torch.cat(parts) for parts in zip(*groups, strict=True))
        prefix = rf"^n{count}\.level{level}_"
        for kind, kept in (("mask", slice(0, 1)), ("multimask", slice(None))):
            for name in golden.names(rf"{prefix}{kind}(?:_every|$)"):
                golden.close(name, vectors.thin_out(masks[:, kept], *vectors.strides(name)), atol=vectors.MASK_ATOL)
        for name in golden.names(rf"{prefix}iou$"):
            golden.close(name, ious[:, :1], atol=vectors.HIDDEN_ATOL)
        for name in golden.names(rf"{prefix}multimask_iou$"):
            golden.close(name, ious, atol=vectors.HIDDEN_ATOL)
    name = f"n{count}.fused_low_res_mask"
    stride = vectors.stored_stride(fused.shape[-1], golden.tensor(name).shape[-1], FUSED_STRIDE)
    golden.close(name, vectors.thin_out(fused[:, None], 1, stride), atol=vectors.MASK_ATOL)

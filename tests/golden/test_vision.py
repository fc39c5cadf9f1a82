"""Golden group `vision`: pixels to image tokens and decoder maps, padding masked."""

import re

import torch

from model.structures import TOWER_KEY
from tests.golden import recipe, released_model, vectors

# Strides over positions at which the layout keeps the longest tensors.
POOLED_STRIDE, MAP_STRIDE = 2, 4


def test_vision() -> None:
    model = released_model.build()
    with torch.no_grad(), vectors.read_group("vision") as golden:
        sizes = golden.facts["clip_resize_hw"]
        entry = golden.facts["pixel_recipe"].read_all()
        pixels = recipe.make_pixels(entry["seed"], entry, sizes)
        resized_sizes = torch.tensor(sizes)
        golden.close("clip_resize", resized_sizes)

        seen_by_projector = []
        hook = model.projector.register_forward_pre_hook(lambda _, inputs: seen_by_projector.append(inputs[0]))
        images = model.encode_images({TOWER_KEY: pixels}, resized_sizes)
        hook.remove()

        tower = model.vision_tower
        golden.close("patch_attention_mask_with_cls", tower.patch_mask(resized_sizes))
        golden.close("llm_image_attention_mask", images.image_token_mask)
        table = tower.model.embeddings.position_embedding.weight
        golden.close("position_embedding_resized", table, atol=vectors.HIDDEN_ATOL)
        golden.close("llm_image_tokens", images.image_tokens, atol=vectors.HIDDEN_ATOL)
        for name in golden.names(r"^llm_pooled_\d+x\d+_before_projector$"):
            compare_thinned(golden, name, seen_by_projector[0], POOLED_STRIDE)
        for scale, feature_map in enumerate(model.feature_maps(images)):
            compare_thinned(golden, f"out_mm_projector_scale{scale}", feature_map.flatten(2).mT, MAP_STRIDE)
        compare_hidden_states(golden, pixels, resized_sizes)


def compare_thinned(golden: vectors.Reading, name: str, found: torch.Tensor, documented: int) -> None:
    """`found` (B, positions, C) against a tensor stored at a stride over positions."""
    stride = vectors.stored_stride(found.shape[1], golden.tensor(name).shape[1], documented)
    golden.close(name, found[:, ::stride], atol=vectors.HIDDEN_ATOL)


def compare_hidden_states(golden: vectors.Reading, pixels: torch.Tensor, resized_sizes: torch.Tensor) -> None:
    """Hidden states stored by layer, from the beginning or (features, without class token) from the end."""
    tower = released_model.build().vision_tower
    for name in golden.names(r"^hidden_state_\d+_cls_and_first\d+$"):
        layer, patches = map(int, re.findall(r"\d+", name))
        (state,) = tower.hidden_states(pixels, resized_sizes, [layer])
        golden.close(name, state[:, : tower.num_class_tokens + patches], atol=vectors.HIDDEN_ATOL)
    for name in golden.names(r"^features_layer_minus\d+$"):
        layer = len(tower.model.encoder.layers) + 1 - int(re.findall(r"\d+", name)[0])
        (state,) = tower.hidden_states(pixels, resized_sizes, [layer])
        golden.close(name, state[:, tower.num_class_tokens :], atol=vectors.HIDDEN_ATOL)

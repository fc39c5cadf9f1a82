"""The released PixelLM of the golden set, in our model: recipe weights under our names, release numerics."""

import functools

import torch

from model import PixelLMForCausalLM
from tests.golden import recipe, vectors
from tests.golden.release_names import name_from_clip, state_dict_from_release
from utils.checkpoints.layouts.published_names import config_from_release, name_from_pixellm

CONSTANTS = {"codebook.token_weights", "pixel_decoder.scale_weights"}  # in no checkpoint (fact M1)
WRAPPER, TOWER = "base_model.model.", "model.vision_tower.vision_tower."


@functools.cache
def build() -> PixelLMForCausalLM:
    """The model of `make`, shared between tests: a test that changes it must bring it back."""
    return make()


def make() -> PixelLMForCausalLM:
    """A new model in float32, everything but the vision tower trainable, refinement off as the release trains."""
    weights = vectors.read_json("weights")
    dims = weights["model_dims"]
    config = config_from_release(
        vectors.read_json("published_config"),
        weights["clip_dims"],
        seg_token_ids=dims["seg_token_idx"],
        image_token_id=dims[
            "vocab_size"
        ],  # the release's placeholder is negative; ours is any id that is never embedded
        refinement_alpha=1.0,
    )
    state = state_dict_from_release(
        recipe.make_tensors(weights["seed"], weights["model_tensors"]),
        recipe.make_tensors(weights["seed"], weights["clip_tensors"]),
        config,
    )
    model = PixelLMForCausalLM(config)
    # The record holds the states of padding too, which shared rows do not compute.
    model.prefix_sharing = False
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, f"no place in our model for {unexpected}"
    assert set(missing) == CONSTANTS, f"the released weights do not fill {sorted(set(missing) - CONSTANTS)}"
    model.requires_grad_(True)
    model.vision_tower.requires_grad_(False)
    return model


def input_ids(ids: torch.Tensor) -> torch.Tensor:
    """Recorded ids with our placeholder for the image in place of the release's."""
    placeholder = vectors.read_json("weights")["model_dims"]["image_token_index"]
    return torch.where(ids == placeholder, build().config.image_token_id, ids)


def name_from_training(wrapped: str) -> str | None:
    """Our name of a tensor of the model that the release trains: PEFT's prefix before every name, the tower inside.

    A weight under an adapter has the name that it has when free.
    """
    name = wrapped.removeprefix(WRAPPER)
    return name_from_clip(name.removeprefix(TOWER)) if name.startswith(TOWER) else name_from_pixellm(name)

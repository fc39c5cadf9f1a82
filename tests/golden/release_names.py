"""The release's state dicts under our names, written out apart from how folders are loaded."""

from collections.abc import Mapping

import torch

from model.configuration_pixellm import PixelLMConfig
from model.vision_tower import resize_position_table
from utils.checkpoints.layouts.names import translate_name
from utils.checkpoints.layouts.published_names import name_from_pixellm

CLIP_NAMES = (("vision_model.*", "vision_tower.model.*"),)
CLIP_UNUSED = ("vision_model.embeddings.position_ids",)
CLIP_POSITION_TABLE = "vision_model.embeddings.position_embedding.weight"
CLIP_CLASS_TOKENS = 1


def name_from_clip(published: str) -> str | None:
    """Our name of a tensor of a stand-alone CLIP vision tower; None for its table of position numbers.

    Raises ValueError for a name that no such tower holds.
    """
    if published in CLIP_UNUSED:
        return None
    found = translate_name(published, CLIP_NAMES)
    if found is None:
        raise ValueError(f"tensor {published!r} does not belong to a stand-alone CLIP vision tower")
    return found


def state_dict_from_release(
    pixellm: Mapping[str, torch.Tensor], clip: Mapping[str, torch.Tensor], config: PixelLMConfig
) -> dict[str, torch.Tensor]:
    """Our state dict from a published PixelLM and the CLIP tower it was trained over.

    Args:
        pixellm: published names -> tensors. clip: names of a stand-alone tower -> tensors, the position table still at
            the tower's own resolution; it is brought to `config`'s grid as `config.position_resize` says.

    Returns:
        Every parameter and buffer of our model, save fusion weights that are constants of the config.
    """
    table = resize_position_table(
        clip[CLIP_POSITION_TABLE], config.grid_size, CLIP_CLASS_TOKENS, config.position_resize
    )
    named = [(name_from_pixellm(name), tensor) for name, tensor in pixellm.items()]
    named += [(name_from_clip(name), tensor) for name, tensor in {**clip, CLIP_POSITION_TABLE: table}.items()]
    return {name: tensor for name, tensor in named if name is not None}

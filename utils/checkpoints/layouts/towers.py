"""Vision towers: a CLIP or SigLIP, alone or in the model of text and images that it came in."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from model.vision_tower import SUPPORTED_TOWERS, resize_position_table
from utils.checkpoints.folders import BuildError, local_folder, read_config
from utils.checkpoints.layouts.layout import Checkpoint, Layout, ModelSource, Part
from utils.checkpoints.layouts.names import rename_tensors
from utils.checkpoints.options import ModelOptions
from utils.checkpoints.tensor_files import StoredTensors, open_tensors
from utils.checkpoints.weight_loading import Origin

TOWER = "vision_tower.model."
POSITION_TABLE = f"{TOWER}embeddings.position_embedding.weight"
CLASS_TOKEN = f"{TOWER}embeddings.class_embedding"
TOWER_NAMES = tuple(
    (f"{prefix}{part}.*", f"{TOWER}{part}.*")
    for prefix in ("vision_model.", "")
    for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")
)


class VisionTower(Layout):
    """A tower by itself, which is no base; --vision-tower takes it."""

    title = "a vision tower"
    expected_names = (
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    )

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return config.get("model_type") in SUPPORTED_TOWERS or "vision_config" in config

    def read(self, checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions) -> ModelSource:
        raise BuildError(
            f"--version {checkpoint.folder} is of type {checkpoint.config.get('model_type')!r}: expected a language "
            "model, a LLaVA or a PixelLM"
        )


def tower_config(flag: str) -> tuple[Path, PretrainedConfig]:
    """The folder that --vision-tower names, and the tower's own config in it; BuildError where it is no tower."""
    folder = local_folder(flag, "--vision-tower")
    config = read_config(folder, "--vision-tower")
    config = getattr(config, "vision_config", config)
    if config.model_type not in SUPPORTED_TOWERS:
        raise BuildError(
            f"--vision-tower {folder} is of type {config.model_type!r}: expected one of {', '.join(SUPPORTED_TOWERS)}"
        )
    return folder, config


def read_tower(flag: str) -> Part:
    """The tower in the folder that --vision-tower names."""
    folder, config = tower_config(flag)
    why_not = f"in {folder}, not part of its vision tower"
    found, theirs, ignored = rename_tensors(open_tensors(folder), TOWER_NAMES, why_not)
    return Part(config, found, Origin(TOWER, f"--vision-tower {folder}", theirs), ignored)


def resize_tower(part: Part, side: int, method: str) -> tuple[PretrainedConfig, StoredTensors]:
    """A tower for images of `side` pixels: its config, and its tensors with the position table brought to that grid.

    method: as in `resize_position_table`. BuildError where the table is not what the tower's config says.
    """
    config, tensors = part.config, part.tensors
    enlarged = type(config).from_dict({**config.to_dict(), "image_size": side})
    table = tensors.get(POSITION_TABLE)
    if table is None:
        return enlarged, tensors  # loading says that it is missing
    class_tokens, patch, width = int(CLASS_TOKEN in tensors), config.patch_size, config.hidden_size
    # A training state holds the table as it was enlarged when it was made.
    shapes = {(class_tokens + (size // patch) ** 2, width) for size in (config.image_size, side)}
    if table.shape not in shapes:
        expected = [class_tokens + (config.image_size // patch) ** 2, width]
        raise BuildError(
            f"{part.origin.place}: tensor {table.name!r} has another shape than its config says (found "
            f"{list(table.shape)}, expected {expected}): copy the model again"
        )
    return enlarged, fit_position_table(tensors, side // patch, method)


def fit_position_table(tensors: StoredTensors, grid: int, method: str) -> StoredTensors:
    """A tower's tensors with the position table, if it is there, brought to `grid` patches a side when it is read."""
    table = tensors.get(POSITION_TABLE)
    if table is None:
        return tensors
    class_tokens = int(CLASS_TOKEN in tensors)
    fitted = table.change(
        (class_tokens + grid**2, *table.shape[1:]),
        lambda value: resize_position_table(value, grid, class_tokens, method),
    )
    return {**tensors, POSITION_TABLE: fitted}

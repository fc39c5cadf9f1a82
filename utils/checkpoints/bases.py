"""What a PixelLM is made from: language model, tower and projector in the folders of others, under our names."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from model.vision_tower import SUPPORTED_TOWERS, resize_position_table
from utils.checkpoints.folders import BuildError, first_sentence, local_folder, read_config
from utils.checkpoints.layouts import LLAVA_15, LLAVA_V1, Checkpoint
from utils.checkpoints.released_checkpoints import matches, renamed, text_config
from utils.checkpoints.tensor_files import Stored, StoredTensor, stored_in
from utils.checkpoints.weight_loading import Origin

LANGUAGE, TOWER, PROJECTOR = "language_model.", "vision_tower.model.", "projector.layers."
POSITION_TABLE = f"{TOWER}embeddings.position_embedding.weight"

# Their name <-> ours, see `released_checkpoints.PIXELLM_NAMES`.
PLAIN_NAMES = (("model.*", "language_model.model.*"), ("lm_head.*", "language_model.lm_head.*"))
_EYE_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")
TOWER_NAMES = tuple(
    (f"{prefix}{part}.*", f"{TOWER}{part}.*") for prefix in ("vision_model.", "") for part in _EYE_PARTS
)
LLAVA_NAMES = (
    ("model.embed_tokens.*", "language_model.model.embed_tokens.*"),
    ("model.norm.*", "language_model.model.norm.*"),
    ("model.layers.*", "language_model.model.layers.*"),
    ("lm_head.*", "language_model.lm_head.*"),
    *((f"model.vision_tower.vision_tower.{theirs}", ours) for theirs, ours in TOWER_NAMES),
    ("model.mm_projector.*", f"{PROJECTOR}*"),
)
_IN_TRANSFORMERS = (
    *((f"vision_tower.{theirs}", ours) for theirs, ours in TOWER_NAMES),
    ("multi_modal_projector.linear_1.*", f"{PROJECTOR}0.*"),
    ("multi_modal_projector.linear_2.*", f"{PROJECTOR}2.*"),
)
TRANSFORMERS_LLAVA_NAMES = (
    *_IN_TRANSFORMERS,
    *((f"model.{theirs}", ours) for theirs, ours in _IN_TRANSFORMERS),
    ("language_model.model.*", "language_model.model.*"),
    ("language_model.lm_head.*", "language_model.lm_head.*"),
    ("model.language_model.*", "language_model.model.*"),
    ("lm_head.*", "language_model.lm_head.*"),
)
# Tables that every program computes for itself.
COMPUTED = ("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
# The language model that LLaVA's first authors put behind each model type of theirs.
LLAVA_KINDS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}


@dataclass
class Part:
    """Something that stands in a folder, read into our names but not into memory.

    config: the language model's or the tower's own. ignored: names there, and why they are not taken.
    """

    config: PretrainedConfig
    tensors: Stored
    origin: Origin
    ignored: dict[str, str] = field(default_factory=dict)


@dataclass
class Llava:
    """The parts of a LLaVA. tower: None where it holds none. tower_name: what its config calls its tower.

    projector: what of it fits into ours; why_new: why it is new where it does not.
    """

    language: Part
    tower: Part | None
    tower_name: str
    projector: Stored
    why_new: str


def sort_out(
    tensors: Stored, names: tuple[tuple[str, str], ...], why_not: str
) -> tuple[Stored, Callable[[str], str], dict[str, str]]:
    """Tensors under our names.

    Returns:
        They; our name of a tensor -> theirs, also of one that is not there; their names that have no place, and why.
    """
    found: Stored = {}
    used: dict[tuple[str, str], None] = {}
    ignored: dict[str, str] = {}
    for name, stored in tensors.items():
        pair = next((pair for pair in names if matches(pair[0], name) is not None), None)
        if any(matches(pattern, name) is not None for pattern in COMPUTED) or name.endswith(".position_ids"):
            ignored[name] = "computed, not learned"
        elif pair is None:
            ignored[name] = why_not
        else:
            used[pair] = None
            found[str(renamed(name, [pair]))] = stored
    back = [(ours, theirs) for theirs, ours in (*used, *names)]
    return found, lambda name: renamed(name, back) or name, ignored


def plain_language_model(checkpoint: Checkpoint, config: PretrainedConfig) -> Part:
    """A Llama, Mistral, Qwen2 or Qwen3 folder."""
    place = f"--version {checkpoint.folder}"
    why = f"in {checkpoint.folder}, not part of its language model"
    found, theirs, ignored = sort_out(checkpoint.tensors, PLAIN_NAMES, why)
    return Part(config, found, Origin(LANGUAGE, place, theirs), ignored)


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


def stand_alone_tower(flag: str) -> Part:
    """A CLIP or SigLIP folder, alone or in the model of text and images that towers come in."""
    folder, config = tower_config(flag)
    found, theirs, ignored = sort_out(stored_in(folder), TOWER_NAMES, f"in {folder}, not part of its vision tower")
    return Part(config, found, Origin(TOWER, f"--vision-tower {folder}", theirs), ignored)


def resized(part: Part, side: int, method: str) -> tuple[PretrainedConfig, Stored]:
    """A tower for images of `side` pixels: its config, and its tensors with the position table brought to that grid.

    method: as in `resize_position_table`. BuildError where the table is not what the tower's config says.
    """
    config = part.config
    tensors = dict(part.tensors)
    enlarged = type(config).from_dict({**config.to_dict(), "image_size": side})
    class_tokens = int(f"{TOWER}embeddings.class_embedding" in tensors)
    table = tensors.get(POSITION_TABLE)
    if table is None:
        return enlarged, tensors  # filling says that it is missing
    patch, width = config.patch_size, config.hidden_size
    # A training state holds the table as it was enlarged when it was made.
    shapes = {(class_tokens + (size // patch) ** 2, width) for size in (config.image_size, side)}
    if table.shape not in shapes:
        expected = [class_tokens + (config.image_size // patch) ** 2, width]
        raise BuildError(
            f"{part.origin.place}: tensor {table.name!r} has another shape than its config says (found "
            f"{list(table.shape)}, expected {expected}): copy the model again"
        )
    grid = side // patch
    tensors[POSITION_TABLE] = table.made(
        (class_tokens + grid**2, width), lambda value: resize_position_table(value, grid, class_tokens, method)
    )
    return enlarged, tensors


# --- LLaVA --------------------------------------------------------------------------------------------------------


def llava(checkpoint: Checkpoint) -> Llava:
    """The parts of a LLaVA in any of its layouts."""
    if checkpoint.layout in (LLAVA_V1, LLAVA_15):
        return _first_published(checkpoint)
    return _in_transformers(checkpoint)


def _first_published(checkpoint: Checkpoint) -> Llava:
    raw, folder = checkpoint.config, checkpoint.folder
    kind = LLAVA_KINDS.get(str(raw.get("model_type")))
    if kind is None:
        raise BuildError(
            f"--version {folder} is {checkpoint.title} of type {raw.get('model_type')!r}: expected one of "
            f"{', '.join(LLAVA_KINDS)} as model_type in its config.json"
        )
    why = f"in {folder}, no part of {checkpoint.title}"
    found, theirs, ignored = sort_out(checkpoint.tensors, LLAVA_NAMES, why)
    return _taken_apart(
        checkpoint,
        text_config(kind, raw),
        None,
        found,
        theirs,
        ignored,
        tower_name=str(raw.get("mm_vision_tower") or raw.get("vision_tower") or ""),
    )


def _in_transformers(checkpoint: Checkpoint) -> Llava:
    folder = checkpoint.folder
    try:
        text = _nested(checkpoint.config, "text_config", "llama")
        vision = _nested(checkpoint.config, "vision_config", "clip_vision_model")
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(
            f"{folder / 'config.json'} is not a config this program can use: {first_sentence(error)}"
        ) from error
    why = f"in {folder}, no part of {checkpoint.title}"
    found, theirs, ignored = sort_out(checkpoint.tensors, TRANSFORMERS_LLAVA_NAMES, why)
    return _taken_apart(checkpoint, text, vision, found, theirs, ignored, tower_name="")


def _nested(config: dict[str, Any], name: str, kind: str) -> PretrainedConfig:
    """One of the two configs inside a LLaVA's; what it leaves out has the defaults of its kind."""
    fields = dict(config[name])
    own = {key: value for key, value in fields.items() if key not in ("model_type", "dtype", "torch_dtype")}
    return AutoConfig.for_model(fields.get("model_type", kind), **own)


def _taken_apart(
    checkpoint: Checkpoint,
    text: PretrainedConfig,
    vision: PretrainedConfig | None,
    found: Stored,
    theirs: Callable[[str], str],
    ignored: dict[str, str],
    tower_name: str,
) -> Llava:
    place = f"--version {checkpoint.folder}"

    def part(prefix: str, config: PretrainedConfig, left_out: dict[str, str]) -> Part:
        tensors = {name: stored for name, stored in found.items() if name.startswith(prefix)}
        return Part(config, tensors, Origin(prefix, place, theirs), left_out)

    has_tower = any(name.startswith(TOWER) for name in found)
    language = part(LANGUAGE, text, ignored)
    eye = part(TOWER, vision or PretrainedConfig(), {}) if has_tower else None
    projector = {name: stored for name, stored in found.items() if name.startswith(PROJECTOR)}
    kept, why_new = _projector(checkpoint, projector, text.hidden_size)
    if not kept:
        language.ignored |= {projector[name].name: why_new for name in projector}
    return Llava(language, eye, tower_name, kept, why_new)


def _projector(checkpoint: Checkpoint, projector: Stored, width: int) -> tuple[Stored, str]:
    """A LLaVA's projector as ours, whose hidden layer is twice as wide, or why it cannot be taken.

    Half of the hidden units are theirs. The other half start as ours do and are multiplied by zeros: they change no
    number until they have trained.
    """
    if checkpoint.layout is LLAVA_V1:
        return {}, "LLaVA v1 projects with one linear layer: the release puts a new projector there too (fact M19)"
    names = {f"{PROJECTOR}{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")}
    if set(projector) != names or projector[f"{PROJECTOR}0.weight"].shape[0] != width:
        return {}, "the projector there is not two linear layers of the language model's width"
    inward, outward = projector[f"{PROJECTOR}0.weight"], projector[f"{PROJECTOR}2.weight"]
    reach = inward.shape[1] ** -0.5
    return {
        f"{PROJECTOR}0.weight": _with_random(inward, reach),
        f"{PROJECTOR}0.bias": _with_random(projector[f"{PROJECTOR}0.bias"], reach),
        f"{PROJECTOR}2.weight": outward.made((outward.shape[0], 2 * width), _with_zeros),
        f"{PROJECTOR}2.bias": projector[f"{PROJECTOR}2.bias"],
    }, ""


def _with_random(stored: StoredTensor, reach: float) -> StoredTensor:
    """As many rows again, drawn as torch draws a linear layer's: uniformly between -reach and reach."""
    shape = (2 * stored.shape[0], *stored.shape[1:])
    return stored.made(shape, lambda value: torch.cat([value, torch.empty_like(value).uniform_(-reach, reach)]))


def _with_zeros(value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value, torch.zeros_like(value)], dim=1)


def tower_of(made: Llava, vision_tower: str | None, folder: Path, title: str) -> tuple[Part, str | None]:
    """The tower that goes with a LLaVA, and why --vision-tower is ignored where it is.

    The LLaVA's own where it holds one; its config is then the LLaVA's, or that in --vision-tower.
    """
    own = made.tower
    if own is not None and own.config.model_type in SUPPORTED_TOWERS:
        return own, f"{folder} is {title}, which has its own" if vision_tower else None
    beside = made.tower_name
    flag = vision_tower or (beside if beside and Path(beside).expanduser().is_dir() else "")
    if not flag:
        asked = f" (its config names {beside!r})" if beside else ""
        raise BuildError(f"{folder} is {title}, whose vision tower{asked} stands apart: --vision-tower is needed")
    if own is None:
        return stand_alone_tower(flag), None
    _, own.config = tower_config(flag)
    return own, f"only the config: {folder} is {title} and holds the tower's weights"

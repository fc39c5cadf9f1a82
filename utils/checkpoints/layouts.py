"""What kind of checkpoint stands in a folder, told by its tensors' names and its config."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.configuration_pixellm import PixelLMConfig
from model.vision_tower import SUPPORTED_TOWERS
from utils.checkpoints.folders import BuildError
from utils.checkpoints.released_checkpoints import matches
from utils.checkpoints.tensor_files import Stored, stored_in, weight_files

# PEFT puts this before every name of the model that it wraps.
PEFT_PREFIX = "base_model.model."
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint.

    title: for a person. telling: name patterns that together only this kind has. usual: names that every one of the
    kind holds, for comparison with one that is unknown.
    """

    title: str
    telling: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()


_WORDS = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight")

OURS = Layout(
    "a PixelLM saved here",
    ("language_model.*", "vision_tower.model.*", "projector.layers.*"),
    (
        "language_model.model.embed_tokens.weight",
        "vision_tower.model.embeddings.patch_embedding.weight",
        "projector.layers.0.weight",
        "mask_projector.layers.0.weight",
        "codebook.layers.0.weight",
        "pixel_decoder.level_embed.weight",
    ),
)
PUBLISHED_PIXELLM = Layout(
    "a published PixelLM",
    ("model.mask_decoder.*",),
    (
        *_WORDS,
        "model.mm_projector.0.weight",
        "model.out_mm_projector.0.weight",
        "model.text_hidden_fcs.0.0.weight",
        "model.mask_decoder.level_embed.weight",
        "model.prompt_encoder.no_mask_embed.weight",
        "model.image_feature_neck.0.weight",
    ),
)
LLAVA_V1 = Layout(
    "LLaVA v1 (linear projector)",
    ("model.mm_projector.weight",),
    (*_WORDS, "model.mm_projector.weight", "model.mm_projector.bias"),
)
LLAVA_15 = Layout(
    "LLaVA 1.5 as first published",
    ("model.mm_projector.{}.weight",),
    (*_WORDS, "model.mm_projector.0.weight", "model.mm_projector.2.weight"),
)
_PROJECTOR_LAYERS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
LLAVA_OLD_TRANSFORMERS = Layout(
    "LLaVA 1.5 in the layout of transformers",
    ("multi_modal_projector.*", "language_model.*"),
    (
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        *(f"multi_modal_projector.{name}" for name in _PROJECTOR_LAYERS),
    ),
)
LLAVA_NEW_TRANSFORMERS = Layout(
    "LLaVA 1.5 in the newer layout of transformers",
    ("model.multi_modal_projector.*", "model.language_model.*"),
    (
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        *(f"model.multi_modal_projector.{name}" for name in _PROJECTOR_LAYERS),
    ),
)
LANGUAGE_MODEL = Layout("a plain language model", (), _WORDS)
_EYE = ("vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight")
VISION_TOWER = Layout("a vision tower", (), (*_EYE, "vision_model.encoder.layers.0.self_attn.q_proj.weight"))

# Told by names, in this order; the rest by the config's model type.
BY_NAMES = (PUBLISHED_PIXELLM, LLAVA_NEW_TRANSFORMERS, LLAVA_OLD_TRANSFORMERS, LLAVA_V1, LLAVA_15)
KNOWN = (OURS, *BY_NAMES, LANGUAGE_MODEL, VISION_TOWER)
LLAVAS = (LLAVA_V1, LLAVA_15, LLAVA_OLD_TRANSFORMERS, LLAVA_NEW_TRANSFORMERS)


@dataclass(frozen=True)
class Relative:
    """A model of the same family that this program does not run: how to tell it, and why it is refused.

    names: patterns of tensors. in_config: parts of its model type or architecture. fields: of its config.
    """

    title: str
    names: tuple[str, ...]
    in_config: tuple[str, ...]
    reason: str
    fields: tuple[str, ...] = ()


_NO_SAM = "and there is no SAM here: give --version the LLaVA that it was made from"
RELATIVES = (
    Relative(
        "Sa2VA",
        ("grounding_encoder.*",),
        ("sa2va",),
        "its masks come from SAM 2's decoder behind an InternVL, "
        "and neither is here: give --version a language model and --vision-tower a tower",
    ),
    Relative(
        "GLaMM",
        ("model.grounding_encoder.*", "model.region_encoder.*"),
        ("glamm",),
        f"its masks come from SAM's decoder and it reads regions too, {_NO_SAM}",
    ),
    Relative(
        "GSVA",
        (),
        ("gsva",),
        f"its masks come from SAM's decoder behind several [SEG] tokens and a [REJ] token, {_NO_SAM}",
        ("rej_token_idx",),
    ),
    Relative(
        "LISA",
        ("model.visual_model.*",),
        ("lisa",),
        f"its masks come from SAM's decoder behind one [SEG] token, {_NO_SAM}",
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose layout is known.

    config: content of its config.json. tensors: by the names of the layout, without PEFT's prefix where it had wrapped
    the model (`wrapped`). Empty for a PixelLM of ours, which its config tells.
    """

    folder: Path
    layout: Layout
    config: dict[str, Any]
    tensors: Stored
    wrapped: bool = False

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"the PEFT-wrapped training state of {self.layout.title}" if self.wrapped else self.layout.title


def read_json_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, {} where there is none or none that can be read: those who need it say so."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recognise(folder: Path) -> Checkpoint:
    """What stands in a folder.

    Raises:
        BuildError: a file cannot be read, the checkpoint is of a model that this program does not run, or it is of none
            that it knows; the message then says which tensors were expected and found, and what is nearest.
    """
    config = read_json_config(folder)
    kind = config.get("model_type")
    if kind == PixelLMConfig.model_type:
        return Checkpoint(folder, OURS, config, {})
    refuse_relatives(folder, config, ())
    stored = stored_in(folder) if weight_files(folder) is not None else {}
    tensors, wrapped = unwrapped(stored)
    refuse_relatives(folder, config, tensors)
    layout = layout_of(tensors)
    if layout is not None:
        return Checkpoint(folder, layout, config, tensors, wrapped)
    if wrapped:
        raise BuildError(f"{folder} holds tensors wrapped by PEFT, {describe_unknown(tensors)}")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind != "llava":
        return Checkpoint(folder, LANGUAGE_MODEL, config, tensors)
    if kind in SUPPORTED_TOWERS or "vision_config" in config:
        return Checkpoint(folder, VISION_TOWER, config, tensors)
    return Checkpoint(folder, Layout("nothing that is known here"), config, tensors)


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout that tensor names tell by themselves, or None."""
    names = list(names)
    for layout in BY_NAMES:
        if all(any(matches(pattern, name) is not None for name in names) for pattern in layout.telling):
            return layout
    return None


def unwrapped(tensors: Stored) -> tuple[Stored, bool]:
    """Tensors by the names they had before PEFT wrapped the model, and whether it had."""
    if not any(name.startswith(PEFT_PREFIX) for name in tensors):
        return tensors, False
    return {name.removeprefix(PEFT_PREFIX): stored for name, stored in tensors.items()}, True


def refuse_relatives(place: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """BuildError for a checkpoint of LISA, GSVA, GLaMM or Sa2VA, with the reason."""
    names = list(names)
    words = [str(config.get("model_type", "")), *map(str, config.get("architectures") or ())]
    for relative in RELATIVES:
        by_name = next((name for name in names if any(matches(p, name) is not None for p in relative.names)), None)
        by_config = next((word for word in words if any(mark in word.lower() for mark in relative.in_config)), None)
        by_config = by_config or next((field for field in config if field in relative.fields), None)
        if by_name or by_config:
            sign = f"tensor {by_name!r}" if by_name else f"{by_config!r} in its config"
            raise BuildError(f"{place} is a checkpoint of {relative.title} ({sign}): {relative.reason}")


def describe_unknown(names: Iterable[str]) -> str:
    """Which tensors the nearest known layout would have, which of them are there, and what is there instead."""
    names = set(names)
    if not names:
        return "and no weights were found in it"
    nearest = max(KNOWN, key=lambda layout: sum(name in names for name in layout.usual) / len(layout.usual))
    found = [name for name in nearest.usual if name in names]
    missing = [name for name in nearest.usual if name not in names]
    known = {name for layout in KNOWN for name in layout.usual}
    others = sorted(name for name in names if name not in known)
    return (
        f"the nearest layout is {nearest.title}: of the tensors expected there, found {_few(found)}; missing "
        f"{_few(missing)}; there are also {_few(others)}"
    )


def _few(names: list[str], shown: int = 2) -> str:
    """Some names, and how many more."""
    if not names:
        return "none"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

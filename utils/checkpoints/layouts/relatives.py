"""Models of the same family that this program does not run: recognised, and refused with the reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoints.folders import BuildError
from utils.checkpoints.layouts.names import match_name


@dataclass(frozen=True)
class Relative:
    """How to tell a model, and why it is refused.

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


def refuse_relatives(place: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """BuildError for a checkpoint of LISA, GSVA, GLaMM or Sa2VA, with the reason."""
    names = list(names)
    words = [str(config.get("model_type", "")), *map(str, config.get("architectures") or ())]
    for relative in RELATIVES:
        by_name = next((n for n in names if any(match_name(p, n) is not None for p in relative.names)), None)
        by_config = next((word for word in words if any(mark in word.lower() for mark in relative.in_config)), None)
        by_config = by_config or next((field for field in config if field in relative.fields), None)
        if by_name or by_config:
            sign = f"tensor {by_name!r}" if by_name else f"{by_config!r} in its config"
            raise BuildError(f"{place} is a checkpoint of {relative.title} ({sign}): {relative.reason}")

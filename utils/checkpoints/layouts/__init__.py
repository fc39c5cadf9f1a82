"""Every kind of checkpoint folder, one family a file, and which of them a folder is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.checkpoints.folders import BuildError, read_config, read_json
from utils.checkpoints.layouts.language_models import LanguageModel
from utils.checkpoints.layouts.layout import Checkpoint, Layout, ModelSource
from utils.checkpoints.layouts.llava_15 import Llava15
from utils.checkpoints.layouts.llava_v1 import LlavaV1
from utils.checkpoints.layouts.names import strip_peft_prefix
from utils.checkpoints.layouts.pixellm import PixelLM
from utils.checkpoints.layouts.published_pixellm import PublishedPixelLM
from utils.checkpoints.layouts.relatives import refuse_relatives
from utils.checkpoints.layouts.towers import VisionTower
from utils.checkpoints.layouts.transformers_llava import NewTransformersLlava, OldTransformersLlava
from utils.checkpoints.options import ModelOptions
from utils.checkpoints.tensor_files import open_tensors, weight_files

__all__ = ["LAYOUTS", "Checkpoint", "Layout", "ModelSource", "recognise"]

LAYOUTS: tuple[Layout, ...] = (
    PixelLM(),
    PublishedPixelLM(),
    NewTransformersLlava(),
    OldTransformersLlava(),
    LlavaV1(),
    Llava15(),
    LanguageModel(),
    VisionTower(),
)
"""The first that matches is what a folder is."""


class UnknownLayout(Layout):
    """What is of no kind known here: never a base, but compared with the nearest that is."""

    title = "nothing that is known here"

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return True

    def read(self, checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions) -> ModelSource:
        found = checkpoint.tensors
        comparison = f"; {describe_unknown(found)}" if found else ""
        try:
            kind = read_config(checkpoint.folder, "--version").model_type
        except BuildError as error:
            raise BuildError(f"{error}{comparison}") from error
        raise BuildError(f"--version {checkpoint.folder} is of type {kind!r}: expected a language model{comparison}")


def recognise(folder: Path) -> Checkpoint:
    """What stands in a folder.

    Raises:
        BuildError: a file cannot be read, or the checkpoint is of a model that this program does not run.
    """
    config = read_json(folder / "config.json")
    refuse_relatives(folder, config, ())
    tensors, wrapped = strip_peft_prefix(open_tensors(folder) if weight_files(folder) is not None else {})
    refuse_relatives(folder, config, tensors)
    layout = next((layout for layout in LAYOUTS if layout.matches(config, tensors)), None)
    if layout is None and wrapped:
        raise BuildError(f"{folder} holds tensors wrapped by PEFT, {describe_unknown(tensors)}")
    return Checkpoint(folder, layout or UnknownLayout(), config, tensors, wrapped)


def describe_unknown(names: Iterable[str]) -> str:
    """Which tensors the nearest known layout would have, which of them are there, and what is there instead."""
    names = set(names)
    if not names:
        return "and no weights were found in it"
    nearest = max(LAYOUTS, key=lambda kind: sum(n in names for n in kind.expected_names) / len(kind.expected_names))
    found = [name for name in nearest.expected_names if name in names]
    missing = [name for name in nearest.expected_names if name not in names]
    known = {name for layout in LAYOUTS for name in layout.expected_names}
    others = sorted(name for name in names if name not in known)
    return (
        f"the nearest layout is {nearest.title}: of the tensors expected there, found {_first_few(found)}; missing "
        f"{_first_few(missing)}; there are also {_first_few(others)}"
    )


def _first_few(names: list[str], shown: int = 2) -> str:
    """Some names, and how many more."""
    if not names:
        return "none"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

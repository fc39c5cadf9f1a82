"""LLaVA 1.5 as first published: a projector of two layers, the tower apart or inside."""

from collections.abc import Iterable
from typing import Any

from utils.checkpoints.layouts.layout import LANGUAGE_MODEL_NAMES
from utils.checkpoints.layouts.llava import Llava, widen_projector
from utils.checkpoints.layouts.names import has_names
from utils.checkpoints.tensor_files import StoredTensors


class Llava15(Llava):
    """As its authors published it."""

    title = "LLaVA 1.5 as first published"
    expected_names = (*LANGUAGE_MODEL_NAMES, "model.mm_projector.0.weight", "model.mm_projector.2.weight")

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return has_names(names, "model.mm_projector.{}.weight")

    def take_projector(self, tensors: StoredTensors, width: int) -> tuple[StoredTensors, str]:
        return widen_projector(tensors, width)

"""LLaVA v1: a linear projector, the tower apart."""

from collections.abc import Iterable
from typing import Any

from utils.checkpoints.layouts.layout import LANGUAGE_MODEL_NAMES
from utils.checkpoints.layouts.llava import Llava
from utils.checkpoints.layouts.names import has_names
from utils.checkpoints.tensor_files import StoredTensors


class LlavaV1(Llava):
    """As its authors published it."""

    title = "LLaVA v1 (linear projector)"
    expected_names = (*LANGUAGE_MODEL_NAMES, "model.mm_projector.weight", "model.mm_projector.bias")

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return has_names(names, "model.mm_projector.weight")

    def take_projector(self, tensors: StoredTensors, width: int) -> tuple[StoredTensors, str]:
        return {}, (
            "LLaVA v1 projects with one linear layer: the release puts a new projector there too (docs/facts.md, M19)"
        )

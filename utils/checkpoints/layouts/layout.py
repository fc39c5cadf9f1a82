"""The interface of a layout: a kind of checkpoint folder that a PixelLM can be built from.

A new kind is a new module here with a subclass of `Layout`, and a line in `layouts.LAYOUTS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor
from utils.checkpoints.folders import BuildError
from utils.checkpoints.options import ModelOptions
from utils.checkpoints.published_extras import PublishedExtras
from utils.checkpoints.tensor_files import StoredTensors
from utils.checkpoints.weight_loading import Origin

LANGUAGE, PROJECTOR = "language_model.", "projector.layers."
TOKEN_TABLE = f"{LANGUAGE}model.embed_tokens.weight"
LANGUAGE_MODEL_NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)
"""Tensors that a Llama, Mistral or Qwen holds, alone or in a LLaVA."""


@dataclass
class Part:
    """The language model or the vision tower of a checkpoint, under our names, not read into memory yet.

    config: the part's own. ignored: names in the checkpoint, and why they are not taken.
    """

    config: PretrainedConfig
    tensors: StoredTensors
    origin: Origin
    ignored: dict[str, str] = field(default_factory=dict)


@dataclass
class ModelSource:
    """What a PixelLM is built from: all but the weights' numbers.

    Attributes:
        tensors: by our names. origins: where they are from, for messages.
        token_rows: rows of the stored embedding table; further ones of the config's vocabulary are new.
        allow_missing: names, or beginnings of names, of tensors that may be absent, and why they are new then.
        layout: what the checkpoint was recognised as. ignored, newly_initialized: for the report, beside what loading
            finds.
        check: called with the model when it has its weights; raises BuildError where it cannot be used.
    """

    config: PixelLMConfig
    processor: PixelLMProcessor
    tensors: StoredTensors
    origins: list[Origin]
    token_rows: int
    allow_missing: dict[str, str]
    layout: str
    ignored: dict[str, str] = field(default_factory=dict)
    newly_initialized: dict[str, str] = field(default_factory=dict)
    published: PublishedExtras | None = None
    check: Callable[[PixelLMForCausalLM], None] | None = None


class Layout(ABC):
    """A kind of checkpoint folder."""

    title: str
    """What a person calls it."""

    expected_names: tuple[str, ...] = ()
    """Some tensors that every one of the kind holds; an unknown checkpoint is compared with them."""

    @abstractmethod
    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        """Whether a config.json ({} for none) and tensor names are those of this kind."""

    @abstractmethod
    def read(self, checkpoint: "Checkpoint", vision_tower: str | None, options: ModelOptions) -> ModelSource:
        """What a PixelLM is built from.

        Args:
            vision_tower: the folder in --vision-tower.

        Raises:
            BuildError: a folder is missing or not what is expected, or options do not fit.
        """

    def language_tensors(self, checkpoint: "Checkpoint") -> StoredTensors:
        """The language model's tensors by our names. BuildError where there is none to build on."""
        raise BuildError(f"{checkpoint.folder} is {self.title}, which holds no language model")


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose layout is known.

    Attributes:
        config: content of its config.json, {} where there is none.
        tensors: by the names of the layout, without PEFT's prefix where PEFT had wrapped the model (`wrapped`).
    """

    folder: Path
    layout: Layout
    config: dict[str, Any]
    tensors: StoredTensors
    wrapped: bool = False

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"the PEFT-wrapped training state of {self.layout.title}" if self.wrapped else self.layout.title

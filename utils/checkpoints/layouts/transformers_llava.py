"""LLaVA 1.5 as transformers writes it, under its older and its newer names: the tower inside."""

from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from utils.checkpoints.folders import BuildError, first_sentence
from utils.checkpoints.layouts.layout import PROJECTOR, Checkpoint
from utils.checkpoints.layouts.llava import Llava, widen_projector
from utils.checkpoints.layouts.names import has_names
from utils.checkpoints.layouts.towers import TOWER_NAMES
from utils.checkpoints.tensor_files import StoredTensors

_OLD_NAMES = (
    *((f"vision_tower.{theirs}", ours) for theirs, ours in TOWER_NAMES),
    ("multi_modal_projector.linear_1.*", f"{PROJECTOR}0.*"),
    ("multi_modal_projector.linear_2.*", f"{PROJECTOR}2.*"),
)
_PROJECTOR_LAYERS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")


class OldTransformersLlava(Llava):
    """Names without a leading `model.`."""

    title = "LLaVA 1.5 in the layout of transformers"
    expected_names = (
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        *(f"multi_modal_projector.{name}" for name in _PROJECTOR_LAYERS),
    )
    names = (
        *_OLD_NAMES,
        *((f"model.{theirs}", ours) for theirs, ours in _OLD_NAMES),
        ("language_model.model.*", "language_model.model.*"),
        ("language_model.lm_head.*", "language_model.lm_head.*"),
        ("model.language_model.*", "language_model.model.*"),
        ("lm_head.*", "language_model.lm_head.*"),
    )

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return has_names(names, "multi_modal_projector.*", "language_model.*")

    def configs(self, checkpoint: Checkpoint) -> tuple[PretrainedConfig, PretrainedConfig | None]:
        try:
            text = _nested_config(checkpoint.config, "text_config", "llama")
            return text, _nested_config(checkpoint.config, "vision_config", "clip_vision_model")
        except (ValueError, KeyError, TypeError) as error:
            path = checkpoint.folder / "config.json"
            raise BuildError(f"{path} is not a config this program can use: {first_sentence(error)}") from error

    def take_projector(self, tensors: StoredTensors, width: int) -> tuple[StoredTensors, str]:
        return widen_projector(tensors, width)


class NewTransformersLlava(OldTransformersLlava):
    """Names with a leading `model.`."""

    title = "LLaVA 1.5 in the newer layout of transformers"
    expected_names = (
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        *(f"model.multi_modal_projector.{name}" for name in _PROJECTOR_LAYERS),
    )

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return has_names(names, "model.multi_modal_projector.*", "model.language_model.*")


def _nested_config(config: dict[str, Any], name: str, kind: str) -> PretrainedConfig:
    """One of the two configs inside a LLaVA's; what it leaves out has the defaults of its kind."""
    fields = dict(config[name])
    own = {key: value for key, value in fields.items() if key not in ("model_type", "dtype", "torch_dtype")}
    return AutoConfig.for_model(fields.get("model_type", kind), **own)

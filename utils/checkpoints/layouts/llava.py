"""What all LLaVA layouts share: names, the projector, and the choice of the tower."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from model.vision_tower import SUPPORTED_TOWERS
from utils.checkpoints.folders import BuildError
from utils.checkpoints.layouts.layout import LANGUAGE, PROJECTOR, Checkpoint, Layout, ModelSource, Part
from utils.checkpoints.layouts.lora import merge_stored_lora, read_lora_alpha
from utils.checkpoints.layouts.names import NamePair, rename_tensors
from utils.checkpoints.layouts.new_model import NEW, assemble
from utils.checkpoints.layouts.published_names import text_config
from utils.checkpoints.layouts.towers import TOWER, TOWER_NAMES, read_tower, tower_config
from utils.checkpoints.options import MASK_PARTS, ModelOptions
from utils.checkpoints.tensor_files import StoredTensor, StoredTensors
from utils.checkpoints.weight_loading import Origin

# The language model that LLaVA's first authors put behind each model type of theirs.
LLAVA_KINDS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
FIRST_PUBLISHED_NAMES: tuple[NamePair, ...] = (
    ("model.embed_tokens.*", "language_model.model.embed_tokens.*"),
    ("model.norm.*", "language_model.model.norm.*"),
    ("model.layers.*", "language_model.model.layers.*"),
    ("lm_head.*", "language_model.lm_head.*"),
    *((f"model.vision_tower.vision_tower.{theirs}", ours) for theirs, ours in TOWER_NAMES),
    ("model.mm_projector.*", f"{PROJECTOR}*"),
)
_WIDER = "half of its hidden units, as ours has twice LLaVA's; multiplied by zeros, they change nothing at first"


class Llava(Layout):
    """A LLaVA: a language model, a projector, and perhaps the tower."""

    names: tuple[NamePair, ...] = FIRST_PUBLISHED_NAMES

    def configs(self, checkpoint: Checkpoint) -> tuple[PretrainedConfig, PretrainedConfig | None]:
        """The language model's own config, and the tower's where the LLaVA's config holds it."""
        raw = checkpoint.config
        kind = LLAVA_KINDS.get(str(raw.get("model_type")))
        if kind is None:
            raise BuildError(
                f"--version {checkpoint.folder} is {checkpoint.title} of type {raw.get('model_type')!r}: expected one "
                f"of {', '.join(LLAVA_KINDS)} as model_type in its config.json"
            )
        return text_config(kind, raw), None

    @abstractmethod
    def take_projector(self, tensors: StoredTensors, width: int) -> tuple[StoredTensors, str]:
        """Ours, made of theirs; or none, and why it cannot be taken. width: of the language model."""

    def read(self, checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions) -> ModelSource:
        folder, config = checkpoint.folder, checkpoint.config
        merged, lora_layers = merge_stored_lora(str(folder), checkpoint.tensors, read_lora_alpha(folder))
        checkpoint = replace(checkpoint, tensors=merged)
        text, vision = self.configs(checkpoint)
        why_not = f"in {folder}, no part of {checkpoint.title}"
        found, theirs, ignored = rename_tensors(merged, self.names, why_not)
        language = _part(LANGUAGE, text, found, folder, theirs, ignored)
        own_tower = None
        if any(name.startswith(TOWER) for name in found):
            own_tower = _part(TOWER, vision or PretrainedConfig(), found, folder, theirs, {})
        theirs_there = {name: stored for name, stored in found.items() if name.startswith(PROJECTOR)}
        projector, why_new = self.take_projector(theirs_there, text.hidden_size)
        allow_missing = dict.fromkeys(MASK_PARTS, NEW)
        if not projector:
            language.ignored |= {stored.name: why_new for stored in theirs_there.values()}
            allow_missing["projector"] = f"new: {why_new}"
        tower_name = str(config.get("mm_vision_tower") or config.get("vision_tower") or "") if vision is None else ""
        tower, not_taken = choose_tower(own_tower, tower_name, vision_tower, folder, checkpoint.title)
        title = f"{checkpoint.title}, LoRA of {lora_layers} layers merged" if lora_layers else checkpoint.title
        source = assemble(folder, title, language, tower, projector, allow_missing, options)
        if projector:
            source.newly_initialized["projector.hidden_units"] = _WIDER
        if not_taken:
            source.ignored["--vision-tower"] = not_taken
        return source

    def language_tensors(self, checkpoint: Checkpoint) -> StoredTensors:
        folder = checkpoint.folder
        merged, _ = merge_stored_lora(str(folder), checkpoint.tensors, read_lora_alpha(folder))
        return rename_tensors(merged, self.names, "")[0]


def _part(
    prefix: str,
    config: PretrainedConfig,
    tensors: StoredTensors,
    folder: Path,
    theirs: Callable[[str], str],
    ignored: dict[str, str],
) -> Part:
    own = {name: stored for name, stored in tensors.items() if name.startswith(prefix)}
    return Part(config, own, Origin(prefix, f"--version {folder}", theirs), ignored)


def widen_projector(tensors: StoredTensors, width: int) -> tuple[StoredTensors, str]:
    """A projector of LLaVA 1.5 as ours, whose hidden layer is twice as wide; or none, and why it cannot be taken.

    Half of the hidden units are theirs. The other half start as ours do and are multiplied by zeros: they change no
    number until they have trained.
    """
    names = {f"{PROJECTOR}{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")}
    if set(tensors) != names or tensors[f"{PROJECTOR}0.weight"].shape[0] != width:
        return {}, "the projector there is not two linear layers of the language model's width"
    inward, outward = tensors[f"{PROJECTOR}0.weight"], tensors[f"{PROJECTOR}2.weight"]
    limit = inward.shape[1] ** -0.5
    return {
        f"{PROJECTOR}0.weight": _append_random_rows(inward, limit),
        f"{PROJECTOR}0.bias": _append_random_rows(tensors[f"{PROJECTOR}0.bias"], limit),
        f"{PROJECTOR}2.weight": outward.change((outward.shape[0], 2 * width), _append_zero_columns),
        f"{PROJECTOR}2.bias": tensors[f"{PROJECTOR}2.bias"],
    }, ""


def _append_random_rows(stored: StoredTensor, limit: float) -> StoredTensor:
    """As many rows again, drawn as torch draws a linear layer's: uniformly between -limit and limit."""
    shape = (2 * stored.shape[0], *stored.shape[1:])
    return stored.change(shape, lambda value: torch.cat([value, torch.empty_like(value).uniform_(-limit, limit)]))


def _append_zero_columns(value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value, torch.zeros_like(value)], dim=1)


def choose_tower(
    own: Part | None, named: str, vision_tower: str | None, folder: Path, title: str
) -> tuple[Part, str | None]:
    """The tower that goes with a LLaVA, and why --vision-tower is ignored where it is.

    Args:
        own: what the LLaVA holds of one; its config is then the LLaVA's, or that in --vision-tower. named: what the
            LLaVA's config calls its tower.
    """
    if own is not None and own.config.model_type in SUPPORTED_TOWERS:
        return own, f"{folder} is {title}, which has its own" if vision_tower else None
    flag = vision_tower or (named if named and Path(named).expanduser().is_dir() else "")
    if not flag:
        asked = f" (its config names {named!r})" if named else ""
        raise BuildError(f"{folder} is {title}, whose vision tower{asked} stands apart: --vision-tower is needed")
    if own is None:
        return read_tower(flag), None
    _, own.config = tower_config(flag)
    return own, f"only the config: {folder} is {title} and holds the tower's weights"

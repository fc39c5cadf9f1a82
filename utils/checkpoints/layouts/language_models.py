"""Plain language models: Llama, Mistral, Qwen2, Qwen3, and others that transformers knows, once they are probed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.modeling_base import MultimodalSequences
from model.modeling_pixellm import PixelLMForCausalLM
from utils.checkpoints.folders import BuildError, first_sentence, load_pretrained, read_config
from utils.checkpoints.layouts.layout import (
    LANGUAGE,
    LANGUAGE_MODEL_NAMES,
    Checkpoint,
    Layout,
    ModelSource,
    Part,
)
from utils.checkpoints.layouts.names import NamePair, rename_tensors
from utils.checkpoints.layouts.new_model import NEW, assemble
from utils.checkpoints.layouts.towers import read_tower
from utils.checkpoints.options import NEW_PARTS, ModelOptions
from utils.checkpoints.tensor_files import StoredTensors, store_tensors
from utils.checkpoints.weight_loading import Origin

KNOWN_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Kinds whose states and head we know to be all there is between tokens and logits; others are probed."""

PLAIN_NAMES: tuple[NamePair, ...] = (
    ("model.*", "language_model.model.*"),
    ("lm_head.*", "language_model.lm_head.*"),
)
# The probe makes logits as large as a trained model's: a soft cap leaves small ones as they are.
PROBE_LOGIT, PROBE_TOLERANCE, PROBE_ROUNDINGS, PROBE_TOKENS = 100.0, 1e-3, 10, 8


class LanguageModel(Layout):
    """A language model by itself; --vision-tower names the tower."""

    title = "a plain language model"
    expected_names = LANGUAGE_MODEL_NAMES

    def matches(self, config: dict[str, Any], names: Iterable[str]) -> bool:
        return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config["model_type"] != "llava"

    def read(self, checkpoint: Checkpoint, vision_tower: str | None, options: ModelOptions) -> ModelSource:
        folder = checkpoint.folder
        config = read_config(folder, "--version")
        if not vision_tower:
            raise BuildError(
                f"{folder} is a plain language model ({config.model_type}): --vision-tower is needed beside it"
            )
        tower = read_tower(vision_tower)
        allow_missing = dict.fromkeys(NEW_PARTS, NEW)
        if config.model_type in KNOWN_LANGUAGE_MODELS:
            why_not = f"in {folder}, not part of its language model"
            found, theirs, ignored = rename_tensors(checkpoint.tensors, PLAIN_NAMES, why_not)
            language = Part(config, found, Origin(LANGUAGE, f"--version {folder}", theirs), ignored)
            title = f"{checkpoint.title} ({config.model_type})"
            return assemble(folder, title, language, tower, {}, allow_missing, options)
        title = f"a language model of another kind ({config.model_type}), its logits compared"
        source = assemble(folder, title, load_other_kind(folder, config), tower, {}, allow_missing, options)
        source.check = probe_language_model
        return source

    def language_tensors(self, checkpoint: Checkpoint) -> StoredTensors:
        return {f"{LANGUAGE}{name}": stored for name, stored in checkpoint.tensors.items()}


def load_other_kind(folder: Path, config: PretrainedConfig) -> Part:
    """A language model of a kind that we only know through transformers, which reads it into memory as it is stored."""
    place = f"--version {folder}"
    model, unused = load_pretrained(AutoModelForCausalLM, folder, "--version", config)
    tensors = {f"{LANGUAGE}{name}": value for name, value in model.state_dict().items()}
    ignored = dict.fromkeys(unused, f"in {folder}, not part of its language model")
    return Part(model.config, store_tensors(tensors, place), Origin(LANGUAGE, place), ignored)


@torch.no_grad()
def probe_language_model(model: PixelLMForCausalLM) -> None:
    """Refuse a language model whose logits are more than its head on its final states (soft caps, scales and the like).

    Raises:
        BuildError: our logits differ from the model's own, or it cannot be asked as we ask.
    """
    kind = model.config.text_config.model_type
    if kind in KNOWN_LANGUAGE_MODELS:
        return
    supported = (
        f"supported are {', '.join(KNOWN_LANGUAGE_MODELS)} and any whose logits are its head on its final states"
    )
    try:
        difference = _probe_difference(model)
    except Exception as error:  # a model of an unknown kind may fail in any way
        raise BuildError(
            f"language models of type {kind!r} are not supported ({first_sentence(error)}): {supported}"
        ) from error
    tolerance = max(PROBE_TOLERANCE, PROBE_ROUNDINGS * torch.finfo(model.language_model.dtype).eps)
    if not difference <= tolerance * PROBE_LOGIT:
        raise BuildError(
            f"language models of type {kind!r} are not supported: our logits differ from the model's own by "
            f"{difference:.3g} where they are up to {PROBE_LOGIT:.0f}: {supported}"
        )


def _probe_difference(model: PixelLMForCausalLM) -> float:
    """How far our logits are from the language model's own, made PROBE_LOGIT large at most.

    The probe is two conversations about one image, which we compute together and the language model apart.
    """
    head = model.get_output_embeddings()
    first = torch.arange(min(PROBE_TOKENS, model.config.text_config.vocab_size))
    second = first.clone()
    second[len(first) // 2 :] = first[len(first) // 2 :].flip(0)
    ids = torch.stack([first, second])
    rows = MultimodalSequences(ids, model.get_input_embeddings()(ids), torch.ones_like(ids).bool(), None)
    states = model.hidden_states(rows, image_index=torch.zeros(2, dtype=torch.long))
    gain = PROBE_LOGIT / head(states).abs().max()
    louder = head.register_forward_hook(lambda _module, _inputs, logits: logits * gain)
    try:
        return (head(states).float() - model.language_model(ids).logits.float()).abs().max().item()
    finally:
        louder.remove()

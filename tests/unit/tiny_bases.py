"""Folders of plain language models and vision towers, as one downloads them, with a few thousand random weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from tests.unit.tokenizer_kinds import CHAT_TEMPLATE, make_tokenizer
from utils.checkpoints.builder import ModelOptions

SIDE, PATCH = 32, 8
SMALL_DECODER = {"embedding_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "decoder_mlp_dim": 16}

# What every kind of language model understands of these; its own names for width and depth come with it.
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # so that positions and words make a difference
    "bos_token_id": None,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.3,
    "initializer_factor": 3.0,
}
_OTHER_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def options(conversation_format: str = "chat_template", **changes: Any) -> ModelOptions:
    """Options of a small pixel decoder."""
    return ModelOptions(conversation_format=conversation_format, **{**SMALL_DECODER, **changes})


def write_language_model(folder: Path, kind: str, tokenizer_kind: str = "byte_bpe", **changes: Any) -> Path:
    """A language model of a kind that transformers knows ("llama", "gpt_neox", ...), with a tokenizer."""
    tokenizer = make_tokenizer(tokenizer_kind, CHAT_TEMPLATE)
    known = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(kind, **{**_TEXT, **known, **changes})
    _write(AutoModelForCausalLM.from_config(config), folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tower(folder: Path, kind: str) -> Path:
    """A "clip" or "siglip" tower; with "_whole" behind it, the model of text and images that towers come in."""
    family, _, whole = kind.partition("_")
    if whole:
        text = {**_OTHER_TEXT, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
        config = AutoConfig.for_model(family, text_config=text, vision_config=_VISION)
    else:
        config = AutoConfig.for_model(f"{family}_vision_model", **_VISION)
    _write(AutoModel.from_config(config), folder)
    return folder


def _write(model: Any, folder: Path) -> None:
    logging.disable_progress_bar()
    model.save_pretrained(folder)

"""A PixelLM small enough for a laptop, made from nothing: a tokenizer trained on given text and random weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from ..configuration_pixellm import PixelLMConfig
from ..modeling_pixellm import PixelLMForCausalLM
from ..processing_pixellm import PixelLMProcessor
from .builder import BuiltModel, LoadReport

# Turns as short as can be told apart: every position costs time on a laptop.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}A: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the tiny model; the fields mean what they mean in `PixelLMConfig` and in the CLIP and Llama configs.

    initializer_range is Llama's: at this width 0.02 sits on a plateau, 0.08 to 0.12 learns.
    """

    image_size: int = 112
    patch_size: int = 16
    image_token_pool: int = 1
    vision_width: int = 128
    vision_layers: int = 6
    vision_feature_layers: tuple[int, ...] = (-2, -4)
    width: int = 128
    layers: int = 4
    num_heads: int = 4
    mlp_width: int = 384
    initializer_range: float = 0.1
    vocab_size: int = 700
    embedding_dim: int = 64
    decoder_num_heads: int = 4
    decoder_mlp_dim: int = 256
    num_scales: int = 2
    tokens_per_scale: int = 3
    model_max_length: int = 512


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: frequent words become one token, any other text is still spelt out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE
    )


def make_tiny(texts: Iterable[str], shape: TinyShape, seed: int) -> BuiltModel:
    """A tiny PixelLM with random weights.

    Args:
        texts: what the tokenizer is trained on.
    """
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    PixelLMProcessor.prepare_tokenizer(tokenizer, shape.num_scales, shape.tokens_per_scale)
    shared: dict[str, Any] = {
        "image_size": shape.image_size,
        "image_token_pool": shape.image_token_pool,
        "num_scales": shape.num_scales,
        "tokens_per_scale": shape.tokens_per_scale,
    }
    processor = PixelLMProcessor(
        tokenizer,
        patch_size=shape.patch_size,
        conversation_format="chat_template",
        model_max_length=shape.model_max_length,
        **shared,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        initializer_range=shape.initializer_range,
        max_position_embeddings=4 * shape.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.num_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    config = PixelLMConfig(
        text_config=text,
        vision_config=vision,
        vision_feature_layers=shape.vision_feature_layers,
        seg_token_ids=processor.seg_token_ids,
        image_token_id=processor.image_token_id,
        embedding_dim=shape.embedding_dim,
        decoder_num_heads=shape.decoder_num_heads,
        decoder_mlp_dim=shape.decoder_mlp_dim,
        **shared,
    )
    torch.manual_seed(seed)
    model = PixelLMForCausalLM(config).eval()
    return BuiltModel(model, processor, LoadReport(fresh=dict.fromkeys(model.state_dict(), "made from nothing")))


def save_base(built: BuiltModel, folder: str | Path) -> None:
    """Save a base that knows no masks yet: without mask parts, which are then new when it is trained on."""
    parts = tuple(f"{name}." for name in ("mask_projector", "codebook", "pixel_decoder"))
    weights = {name: value for name, value in built.model.state_dict().items() if not name.startswith(parts)}
    built.model.save_pretrained(folder, state_dict=weights)
    built.processor.save_pretrained(folder)

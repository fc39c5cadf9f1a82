"""A PixelLM small enough for a laptop, made from nothing: a tokenizer trained on given text and random weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from model.processing_pixellm import PixelLMProcessor
from model.vision_tower import VisionTower
from utils.checkpoints.builder import BuildError, BuiltModel, LoadReport

# Turns as short as can be told apart: every position costs time on a laptop.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}A: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Where a tower's heads look at first, as (columns, rows), and how strongly; the shortest of the waves that tell places
# apart, in radians per patch, and how many times longer the longest is.
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))
LOOK_STRENGTH, SHORTEST_WAVE, WAVE_RANGE = 2.0, 2.0, 10.0
# From this layer on half of the heads look nowhere in particular: what is alike, and is to be counted, may be anywhere.
FIRST_FREE_LAYER = 2
# How strong embeddings are, how much is left of what the language model's MLPs add, and of a word's embedding in the
# row that scores it.
EMBEDDING_STRENGTH, MLP_SHARE, SCORING_SHARE = 8.0, 0.3, 0.06
# The last channels of the language model's states: the mark of image tokens, then the mark of words. The marks outweigh
# the rest, so that a norm leaves a word as strong beside many others as alone.
NUM_MARKS, MARK = 2, 15.0
# How a language model's heads look back: how strongly, what they look for as distances with the share they pass on, and
# the slowest rotation, in radians per word, that tells a word from its neighbour.
BACK_STRENGTH, LOOKS_BACK, SLOWEST_TO_TELL_NEIGHBOURS = 14.0, {1: 2.0, 2: 1.4, 3: 1.4, 4: 1.4}, 0.05
ROTARY_BASE = 1e6


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the tiny model; the fields mean what they mean in `PixelLMConfig` and in the CLIP and Llama configs.

    num_heads are the tower's, text_num_heads of text_head_dim channels the language model's.
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
    text_num_heads: int = 8
    text_head_dim: int = 32
    mlp_width: int = 384
    initializer_range: float = 0.1
    vocab_size: int = 1000
    embedding_dim: int = 64
    decoder_num_heads: int = 4
    decoder_mlp_dim: int = 256
    num_scales: int = 2
    tokens_per_scale: int = 3
    model_max_length: int = 512


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: frequent words become one token, any other text is still spelt out.

    Digits belong to the word they stand in, so that a place such as "e2" is one token.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]+|\s+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
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


def make_tiny(texts: Iterable[str], shape: TinyShape, seed: int, names: Sequence[str] = ()) -> BuiltModel:
    """A tiny PixelLM with random weights.

    Args:
        texts: what the tokenizer is trained on.
        names: words that names of several words are made of, see `look_back`.
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
        num_attention_heads=shape.text_num_heads,
        num_key_value_heads=shape.text_num_heads,
        head_dim=shape.text_head_dim,
        initializer_range=shape.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
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
    look_at_neighbours(model.vision_tower)
    built = BuiltModel(
        model, processor, LoadReport(newly_initialized=dict.fromkeys(model.state_dict(), "made from nothing"))
    )
    balance_residuals(model.language_model)
    look_back(model, [word_id(processor, name) for name in names])
    return built


@torch.no_grad()
def balance_residuals(language_model: PreTrainedModel) -> None:
    """Let words weigh as much in the residual stream as what the layers add to them, and the head score what it holds.

    With one `initializer_range` for all, embeddings are far weaker than the output of the first layer.
    """
    decoder = language_model.get_decoder()
    words = decoder.embed_tokens.weight.mul_(EMBEDDING_STRENGTH)
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.div_((2 * len(decoder.layers)) ** 0.5)
        layer.mlp.down_proj.weight.mul_(MLP_SHARE / (2 * len(decoder.layers)) ** 0.5)
    language_model.get_output_embeddings().weight.copy_(words * SCORING_SHARE)


@torch.no_grad()
def look_back(model: PixelLMForCausalLM, name_ids: Sequence[int] = ()) -> None:
    """Start heads of the language model's first layer looking at the words one to four back; the others stay free.

    To copy a list, or to look up what an image shows beside a name, a word must know those before it, and learning to
    look back is what this waits for. Query and key of such a head read the words' mark, the query turned back by the
    head's distance. All of them find the words `name_ids`, and of the other words as much as a head has channels for,
    each another part. What is found one back is added as it is: "red circle" is then a sum of two words where it ends.
    What is found farther back is turned, so that words are told apart by their distance ("the circle that is red"). All
    of it trains on.
    """
    decoder, text = model.language_model.get_decoder(), model.config.text_config
    words, to_tokens = decoder.embed_tokens.weight, cast(nn.Linear, model.projector.layers[2])
    width, channels = words.shape[1], text.head_dim
    strength = words.square().mean().sqrt()
    words[:, -NUM_MARKS:] = torch.tensor([0.0, MARK])
    model.language_model.get_output_embeddings().weight[:, -NUM_MARKS:] = 0
    to_tokens.weight[-NUM_MARKS:] = 0
    to_tokens.bias[-NUM_MARKS:] = torch.tensor([MARK, 0.0])
    mark_after_norm = MARK / ((strength**2 * (width - NUM_MARKS) + MARK**2) / width) ** 0.5
    frequencies = ROTARY_BASE ** -(torch.arange(channels // 2) / (channels // 2))
    fast = frequencies[frequencies > SLOWEST_TO_TELL_NEIGHBOURS]
    gain = (BACK_STRENGTH * channels**0.5 / len(fast)) ** 0.5 / mark_after_norm
    attention = decoder.layers[0].self_attn
    first = torch.randn(width, width)
    first[:, : len(name_ids)] = words[list(name_ids)].T
    first[-NUM_MARKS:] = 0
    found, turned = torch.linalg.qr(first)[0].T, torch.linalg.qr(torch.randn(width, width))[0]
    fitting, others = min(text.num_attention_heads - 1, width // channels), len(name_ids)
    for head, (distance, share) in enumerate(list(LOOKS_BACK.items())[:fitting]):
        own, angle = slice(head * channels, (head + 1) * channels), distance * frequencies[: len(fast)]
        query, key = torch.zeros(channels, width), torch.zeros(channels, width)
        key[: len(fast), -1] = gain
        query[: len(fast), -1] = gain * angle.cos()
        query[channels // 2 : channels // 2 + len(fast), -1] = -gain * angle.sin()
        attention.q_proj.weight[own], attention.k_proj.weight[own] = query, key
        taken = torch.cat([found[: len(name_ids)], found[others : others + channels - len(name_ids)]])
        others += channels - len(name_ids)
        attention.v_proj.weight[own] = taken
        passed_on = taken.T if distance == 1 else turned[:, own]
        attention.o_proj.weight[:, own] = share * passed_on
        attention.v_proj.weight[own, -NUM_MARKS:] = 0
        attention.o_proj.weight[-NUM_MARKS:, own] = 0


@torch.no_grad()
def look_at_neighbours(tower: VisionTower) -> None:
    """Start the tower's attention heads looking one patch to the left, right, above and below, later ones in part.

    What form a patch belongs to is decided beside it, and finding the neighbours takes a head as long as all the rest
    of seeing. The last channels of a patch are given to waves of its column and row; query and key of each head read
    them, the query turned by the step the head takes. All of it trains on.
    """
    config = tower.model.config
    channels = config.hidden_size // config.num_attention_heads  # of a head, and as many for the waves
    frequencies = SHORTEST_WAVE * WAVE_RANGE ** -torch.linspace(0, 1, channels // 4)
    first = config.hidden_size - 4 * len(frequencies)
    steps = torch.arange(tower.grid_size)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    phases = torch.cat([axis.flatten()[:, None] * frequencies for axis in (columns, rows)], dim=1)
    embeddings = tower.model.embeddings
    embeddings.patch_embedding.weight[first:] = 0
    table = embeddings.position_embedding.weight
    table.zero_()
    table[tower.num_class_tokens :, first:] = torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(1)
    for number, layer in enumerate(tower.model.encoder.layers):
        attention, heads = layer.self_attn, config.num_attention_heads
        for head in range(heads if number < FIRST_FREE_LAYER else heads // 2):
            turn = torch.cat([step * frequencies for step in NEIGHBOURS[head % len(NEIGHBOURS)]])
            sine, cosine = 2 * torch.arange(len(turn)), 2 * torch.arange(len(turn)) + 1
            rotation = torch.zeros(2 * len(turn), 2 * len(turn))
            rotation[sine, sine], rotation[sine, cosine] = turn.cos(), turn.sin()
            rotation[cosine, cosine], rotation[cosine, sine] = turn.cos(), -turn.sin()
            own = slice(head * channels, head * channels + len(rotation))
            attention.q_proj.weight[own, first:] += LOOK_STRENGTH * rotation
            attention.k_proj.weight[own, first:] += LOOK_STRENGTH * torch.eye(len(rotation))


def embeddings_of(built: BuiltModel, words: Sequence[Sequence[str]]) -> list[torch.Tensor]:
    """For each kind of word the (words, H) embeddings, less their marks. BuildError: a word takes several tokens."""
    table = built.model.get_input_embeddings().weight.detach()
    return [without_marks(table[[word_id(built.processor, word) for word in kind]]) for kind in words]


def without_marks(vectors: torch.Tensor) -> torch.Tensor:
    """(…, H) the same, with 0 for the marks of words and of image tokens."""
    return torch.cat([vectors[..., :-NUM_MARKS], torch.zeros_like(vectors[..., -NUM_MARKS:])], dim=-1)


def word_id(processor: PixelLMProcessor, word: str) -> int:
    """The token of a word inside a sentence. BuildError when it takes several."""
    ids = processor.tokenizer.encode(f" {word}", add_special_tokens=False)
    if len(ids) != 1:
        raise BuildError(f"the word {word!r} takes {len(ids)} tokens, expected one: raise the tokenizer's vocab_size")
    return ids[0]

"""A PixelLM small enough for a laptop, made from nothing: a tokenizer trained on given text and random weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..configuration_pixellm import PixelLMConfig
from ..modeling_pixellm import PixelLMForCausalLM
from ..processing_pixellm import PixelLMProcessor
from ..vision_tower import VisionTower
from .builder import BuildError, BuiltModel, LoadReport

# Turns as short as can be told apart: every position costs time on a laptop.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Q: {{ message['content'] }}\n"
    "{% else %}A: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
LONGEST_WAVE, POSITION_STRENGTH = 100.0, 0.5
EMBEDDING_STRENGTH = 8.0


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
    place_patches(model.vision_tower)
    balance_residuals(model.language_model)
    return BuiltModel(model, processor, LoadReport(fresh=dict.fromkeys(model.state_dict(), "made from nothing")))


@torch.no_grad()
def balance_residuals(language_model: PreTrainedModel) -> None:
    """Let words weigh as much in the residual stream as what the layers add to them.

    With one `initializer_range` for all, embeddings are far weaker than the output of the first layer.
    """
    decoder = language_model.get_decoder()
    decoder.embed_tokens.weight.mul_(EMBEDDING_STRENGTH)
    for layer in decoder.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.div_((2 * len(decoder.layers)) ** 0.5)


@torch.no_grad()
def place_patches(tower: VisionTower) -> None:
    """Start a tower's position table from sines and cosines of row and column, half as strong as the patches.

    CLIP's own start is far weaker than a patch. That this one makes a tower learn faster has not been shown.
    """
    table = tower.model.embeddings.position_embedding.weight
    grid, waves = tower.grid_size, table.shape[1] // 4
    frequencies = LONGEST_WAVE ** -(torch.arange(waves) / waves)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    phases = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    waves_ND = torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1)
    table[tower.num_class_tokens :, : waves_ND.shape[1]] = POSITION_STRENGTH * waves_ND


class PatchReader(nn.Module):
    """Tells the words of each patch: how a tower and its projector learn to see before there are sentences.

    A word's score at a patch is the product of the patch's image token with the word's embedding, which stays as it is:
    the language model will find image tokens that point where its words do.

    Args:
        words: for each kind of word (colour, form, …) the words; each must be one token.
    """

    def __init__(self, built: BuiltModel, words: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.tower, self.projector = built.model.vision_tower, built.model.projector
        embeddings = built.model.get_input_embeddings().weight.detach()
        self.words = [embeddings[[_token_of(built.processor, word) for word in kind]] for kind in words]

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and share of right words.

        Args:
            pixel_values: (B, 3, P, P), a picture that fills its square.
            labels: (B, kinds, patches) long, numbers of words; 0 in the first kind marks background.

        Returns:
            The sum over kinds of the mean cross entropy, and (kinds,) the share of right words off the background.
        """
        size = torch.tensor(pixel_values.shape[-2:]).expand(len(pixel_values), -1)
        tokens = self.projector(self.tower(pixel_values, size)[0])
        shown, losses, right = labels[:, 0] > 0, [], []
        for kind, words in enumerate(self.words):
            scores, truth = tokens @ words.T, labels[:, kind]
            losses.append(F.cross_entropy(scores.flatten(0, 1), truth.flatten()))
            right.append((scores.argmax(-1) == truth)[shown].float().mean())
        return torch.stack(losses).sum(), torch.stack(right).detach()


def _token_of(processor: PixelLMProcessor, word: str) -> int:
    ids = processor.tokenizer.encode(f" {word}", add_special_tokens=False)
    if len(ids) != 1:
        raise BuildError(f"the word {word!r} takes {len(ids)} tokens, expected one: raise the tokenizer's vocab_size")
    return ids[0]

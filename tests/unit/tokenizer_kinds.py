"""Small tokenizers of the kinds that bases come with, made on the spot."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from model.processing_pixellm import PixelLMProcessor

FIXTURES = Path(__file__).parent.parent / "fixtures"
KINDS = ("slow_llama", "fast_llama", "byte_bpe", "unigram", "words")

# Turns a Qwen2-like template makes of a conversation: no beginning token, every turn ended by <|im_end|>.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = [
    "It is the red circle. And the blue square, please: the green star, the big triangle and two others.",
    "Sure, the red circle and the blue square are here. Which shapes are there? There is no car.",
    "A chat between a curious human and an artificial intelligence assistant. USER: What can you see? ASSISTANT: one",
    "The assistant gives helpful, detailed, and polite answers to the human's questions. [INST] [/INST] more",
    "And which of them is green?",
]


def make_tokenizer(kind: str, chat_template: str | None = None) -> Any:
    """A fresh tokenizer of one of KINDS, without the tokens a PixelLM adds."""
    if kind == "slow_llama":
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return SentencePieceBackend(vocab_file=str(FIXTURES / "tokenizer.model"), legacy=True, **special)
    if kind == "fast_llama":
        return LlamaTokenizer.from_pretrained(FIXTURES)
    maker = {"byte_bpe": _byte_bpe, "unigram": _unigram, "words": _words}[kind]
    tokenizer = maker()
    tokenizer.chat_template = chat_template
    return tokenizer


def make_processor(kind: str = "byte_bpe", chat_template: str | None = None, **settings: Any) -> PixelLMProcessor:
    """A processor over such a tokenizer; by default 2 scales x 3 tokens and 4 x 4 positions for an image."""
    settings = {"image_size": 112, "image_token_pool": 2, "patch_size": 14, **settings}
    scales, tokens = settings.setdefault("num_scales", 2), settings.setdefault("tokens_per_scale", 3)
    tokenizer = PixelLMProcessor.prepare_tokenizer(make_tokenizer(kind, chat_template), scales, tokens)
    return PixelLMProcessor(tokenizer, **settings)


def _byte_bpe() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _unigram() -> Any:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False)
    core.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _words() -> Any:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    core.train_from_iterator(_CORPUS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")

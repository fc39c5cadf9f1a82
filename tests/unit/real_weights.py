"""The real weights of PIXELLM_REALDATA in the layout of transformers."""

import struct
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

HEADER = struct.Struct("7i")
PIECE = struct.Struct("fi")
TIED = 0  # a positive number of words: the head is the embedding table


def write_stories(folder: Path, realdata: Path) -> Path:
    """stories260K, converted from llama2.c's format."""
    source = realdata / "weights" / "stories260K"
    content = (source / "stories260K.bin").read_bytes()
    width, hidden, depth, heads, kv_heads, words, length = HEADER.unpack(content[: HEADER.size])
    assert words > TIED
    numbers = torch.frombuffer(bytearray(content[HEADER.size :]), dtype=torch.float32)
    kv_width, used = width // heads * kv_heads, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal used
        count = int(torch.tensor(shape).prod())
        used += count
        return numbers[used - count : used].view(shape).clone()

    order = ("table", "norm1", "q", "k", "v", "o", "norm2", "gate", "down", "up")
    shapes = (
        (words, width),
        *((depth, *shape) for shape in ((width,), (width, width), (kv_width, width), (kv_width, width))),
        *((depth, *shape) for shape in ((width, width), (width,), (hidden, width), (width, hidden), (hidden, width))),
    )
    part = {name: take(*shape) for name, shape in zip(order, shapes, strict=True)}
    state = {"model.embed_tokens.weight": part["table"], "model.norm.weight": take(width)}
    for layer in range(depth):
        place = f"model.layers.{layer}."
        state |= {
            f"{place}self_attn.q_proj.weight": _halves(part["q"][layer], heads),
            f"{place}self_attn.k_proj.weight": _halves(part["k"][layer], kv_heads),
            f"{place}self_attn.v_proj.weight": part["v"][layer],
            f"{place}self_attn.o_proj.weight": part["o"][layer],
            f"{place}input_layernorm.weight": part["norm1"][layer],
            f"{place}post_attention_layernorm.weight": part["norm2"][layer],
            **{f"{place}mlp.{name}_proj.weight": part[name][layer] for name in ("gate", "up", "down")},
        }
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.save_pretrained(folder)
    _stories_tokenizer(source / "tok512.bin").save_pretrained(folder)
    return folder


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of rotated pairs, side by side in llama2.c, brought into the two halves that transformers rotates."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _stories_tokenizer(path: Path) -> LlamaTokenizer:
    """llama2.c's list of pieces, best merge first, as a tokenizer of pairs."""
    content = path.read_bytes()[4:]  # the length of the longest piece comes first
    pieces: list[str] = []
    while content:
        _, length = PIECE.unpack(content[: PIECE.size])
        pieces.append(content[PIECE.size : PIECE.size + length].decode("utf-8", errors="replace").replace(" ", "▁"))
        content = content[PIECE.size + length :]
    pieces[1:3] = ["<s>", "</s>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[3:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def tokenizer_cases(realdata: Path) -> list[tuple[str, list[int]]]:
    """(text, ids without the beginning token) that the sentencepiece model of Llama 2 gives."""
    folder = realdata / "reference" / "llama_spm"
    texts = (folder / "ggml-vocab-llama-spm.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-llama-spm.gguf.out").read_text(encoding="utf-8").split("\n")
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]

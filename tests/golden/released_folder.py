"""The golden set's PixelLM and its CLIP tower as folders, the way they were published."""

import json
import string
from pathlib import Path

import torch
from transformers import LlamaTokenizer

from tests.golden import recipe, vectors

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"


def write_pixellm(folder: Path) -> Path:
    """Every tensor of the published list of names: the recipe's, and the rotary frequencies, which are known."""
    weights = vectors.read_json("weights")
    tensors = recipe.make_tensors(weights["seed"], weights["model_tensors"])
    for name, entry in vectors.read_json("state_dict_keys_published")["tensors"].items():
        if name not in tensors:
            (half,) = entry["shape"]
            tensors[name] = 1.0 / weights["model_dims"]["rope_theta"] ** (torch.arange(half) / half)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(vectors.read_json("published_config")))
    _write_words(folder, weights["model_dims"]["seg_token_idx"][0])
    return folder


def write_tower(folder: Path) -> Path:
    """The stand-alone tower, at its own resolution."""
    weights = vectors.read_json("weights")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(recipe.make_tensors(weights["seed"], weights["clip_tensors"]), folder / WEIGHTS)
    config = {**weights["clip_dims"], "model_type": "clip_vision_model"}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _write_words(folder: Path, count: int) -> None:
    """A tokenizer of as many words as the model has before its added tokens: letters, and names for the rest."""
    names = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *string.digits, *".,:?!'\n<>[]/"]
    assert len(names) <= count, f"a model of {count} words is too small for a tokenizer that can write questions"
    names += [f"word{number}" for number in range(len(names), count)]
    LlamaTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[]).save_pretrained(folder)

"""Weights are read one by one into the type that is asked for: no second copy, none in float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit import released_folders as folders
from utils.checkpoints.tensor_files import open_tensors, weight_files
from utils.checkpoints.weight_loading import initialize_new_rows

MOST = 1.3  # times the checkpoint


def write_large_llava(folder: Path, width: int, layers: int, form: str, kind: torch.dtype) -> int:
    """A LLaVA of the first layout with random words; returns the bytes of its tensors, written shard by shard."""
    text = {
        **folders.TEXT,
        "vocab_size": folders.PIECES,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    shapes: dict[str, list[int]] = {"model.norm.weight": [width]}
    shapes |= {name: [folders.PIECES, width] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes |= {"model.mm_projector.weight": [width, folders.EYE_WIDTH], "model.mm_projector.bias": [width]}
    for layer in range(layers):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}self_attn.{x}_proj.weight": [width, width] for x in "qkvo"}
        shapes |= {f"{place}mlp.{x}_proj.weight": [3 * width, width] for x in ("gate", "up")}
        shapes[f"{place}mlp.down_proj.weight"] = [width, 3 * width]
        shapes |= {f"{place}{x}_layernorm.weight": [width] for x in ("input", "post_attention")}
    tensors = {name: torch.full(shape, 0.01, dtype=kind) for name, shape in shapes.items()}
    folders.write_weights(tensors, folder, form)
    folders.write_config(folder, {**folders.ORIGINAL, **text, "model_type": "llava"})
    folders.write_tokenizer(folder)
    return sum(value.numel() * value.element_size() for value in tensors.values())


def most_memory(version: Path, tower: str, dtype: str, env: dict[str, str]) -> tuple[int, list[str]]:
    """Anonymous bytes that loading took at the most, above those before, and the types of the parameters."""
    script = Path(__file__).with_name("loading_memory.py")
    command = [sys.executable, str(script), str(version), tower, dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    highest, *kinds = done.stdout.split()
    return int(highest), kinds


def check(folder: Path, size: int, tower: str, dtype: str, env: dict[str, str], new: int) -> None:
    highest, kinds = most_memory(folder, tower, dtype, env)
    print(f"{folder.name}: {highest / 2**20:.0f} MiB for {size / 2**20:.0f} MiB: {highest / size:.3f} times")
    assert kinds == [f"torch.{dtype}"]
    assert highest - new <= MOST * size
    assert highest > 0.9 * size, "it is in memory at all"


def added(width: int) -> int:
    """Bytes, in 16 bits, of what is new in a PixelLM over a language model of `width`."""
    projector = 2 * width * (folders.EYE_WIDTH + width)
    return 2 * (2 * projector + width * (width + 2 * 256) + 9_000_000)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("form", ["sharded model.safetensors"])
def test_a_small_checkpoint_is_held_once(form: str, child_env: dict[str, str], tmp_path: Path) -> None:
    eye = str(folders.write_eye(tmp_path / "eye"))
    size = write_large_llava(tmp_path / "llava", 1024, 6, form, torch.float16)
    check(tmp_path / "llava", size, eye, "bfloat16", child_env, added(1024))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(
    ("form", "kind", "asked"),
    [
        *((form, torch.bfloat16, "bfloat16") for form in folders.FORMS),
        ("sharded pytorch_model.bin", torch.float16, "float16"),
        ("model.safetensors", torch.float16, "bfloat16"),
    ],
)
def test_a_gigabyte_is_held_once(
    form: str, kind: torch.dtype, asked: str, child_env: dict[str, str], tmp_path: Path
) -> None:
    eye = str(folders.write_eye(tmp_path / "eye"))
    size = write_large_llava(tmp_path / "llava", 2048, 10, form, kind)
    assert size > 10**9
    # All that is new in a PixelLM counts too.
    check(tmp_path / "llava", size, eye, asked, child_env, new=0)
    for file in weight_files(tmp_path / "llava") or []:
        os.truncate(file, 0)


def test_a_tensor_is_not_in_memory_before_it_is_read(tmp_path: Path) -> None:
    folders.write_weights({"a": torch.ones(4), "b": torch.ones(2)}, tmp_path, "model.safetensors")
    assert {name: stored.shape for name, stored in open_tensors(tmp_path).items()} == {"a": (4,), "b": (2,)}


def test_drawn_rows_lie_around_the_mean() -> None:
    torch.manual_seed(0)
    table = torch.cat([3 + 2 * torch.randn(5000, 8), torch.full((500, 8), torch.nan)])
    initialize_new_rows(table, 5000)
    mean, deviation = table[:5000].mean(0), table[:5000].std(0)
    new = (table[5000:] - mean) / deviation
    # A hundredth of the others' deviation, within four standard errors of 500 draws.
    assert new.mean(0).abs().max() < 4 * 0.01 / 500**0.5
    assert (new.std(0) / 0.01 - 1).abs().max() < 4 / (2 * 500) ** 0.5

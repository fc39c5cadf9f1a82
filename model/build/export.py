"""From what training left on disk to one Hugging Face folder: read the weights, fit them in, merge LoRA, save."""

import errno
import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .builder import BuildError, BuiltModel, TrainingRecipe, inject_lora, load_weights_into, merge_lora, save_model

# The names under which DeepSpeed, the plain engine and transformers leave weights in a folder; an index comes first.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_NAMES = ("model.safetensors", "pytorch_model.bin")
LATEST = "latest"
_LORA_A = re.compile(r"\.(?P<layer>[^.]+)\.lora_A\.")
_WEIGHT_FILES = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)


def read_trained_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors that training left.

    Args:
        path: a file (.safetensors, else a PyTorch state dict), a folder with such files, whole or sharded with an index
            (what zero_to_fp32.py writes, whatever the name it was given), or a checkpoint folder whose `latest` names
            a folder with such files.

    Raises:
        BuildError: nothing there, not weights, or a checkpoint that zero_to_fp32.py has to gather first.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _read_file(place)
    if not place.is_dir():
        raise BuildError(f"--weight {path} does not exist: give the file or folder that zero_to_fp32.py wrote")
    for index in (place / name for name in INDEX_NAMES):
        if index.is_file():
            return _read_shards(index)
    for whole in (place / name for name in WHOLE_NAMES):
        if whole.is_file():
            return _read_file(whole)
    tag = place / LATEST
    if tag.is_file() and (inside := place / tag.read_text(encoding="utf-8").strip()) != place and inside.is_dir():
        if any((inside / name).is_file() for name in (*INDEX_NAMES, *WHOLE_NAMES)):
            return read_trained_weights(inside)
        raise BuildError(
            f"--weight {path} is a DeepSpeed checkpoint, whose weights are spread over its ranks: run "
            f"`cd {path} && python zero_to_fp32.py . ../pytorch_model.bin` and give --weight that pytorch_model.bin"
        )
    raise BuildError(
        f"--weight {path} holds no weights: expected {', '.join(WHOLE_NAMES)} or one of their shard indices in it"
    )


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        )
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BuildError(f"{path} is not a whole file of weights ({reason}): export or copy it again") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BuildError(f"{path} does not hold tensors by name: expected a state dict, as zero_to_fp32.py writes it")
    return weights


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BuildError(f"{index} is not an index of weights: copy the folder again") from error
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise BuildError(f"{index} names the shard {name!r}, which is not beside it: copy all of the folder")
        weights |= _read_file(index.parent / name)
    return weights


def lora_of(weights: dict[str, torch.Tensor], source: str) -> tuple[int, str] | None:
    """(rank, layer names joined by commas) of the LoRA in a state dict, or None; BuildError if ranks differ."""
    found = {match["layer"]: int(value.shape[0]) for name, value in weights.items() if (match := _LORA_A.search(name))}
    if not found:
        return None
    if len(set(found.values())) > 1:
        raise BuildError(f"{source} holds LoRA of several ranks ({found}): expected one rank for all layers")
    return next(iter(found.values())), ",".join(sorted(found))


def fill_and_merge(built: BuiltModel, weights: dict[str, torch.Tensor], source: str, lora_alpha: int) -> int:
    """Put trained weights into a model strictly and merge the LoRA among them.

    Its rank and layers are read off the weights. BuildError names a tensor that is missing, superfluous or of another
    shape. Returns the number of layers merged.
    """
    lora = lora_of(weights, source)
    if lora is not None:
        rank, layers = lora
        recipe = TrainingRecipe(lora_r=rank, lora_alpha=lora_alpha, lora_dropout=0.0, lora_target_modules=layers)
        inject_lora(built.model, recipe)
    load_weights_into(built.model, weights, source)
    return merge_lora(built.model)


def write_folder(
    built: BuiltModel, folder: str | Path, max_shard_size: str = "5GB", left_out: tuple[str, ...] = ()
) -> None:
    """Save model, processor and their code; `folder` gets them only when all of it is written.

    Weights of an earlier export in `folder` are replaced. left_out: as in `save_model`. Raises BuildError when there is
    no space or no permission.
    """
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise BuildError(f"--save_path {folder} is a file: give a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            save_model(built.model, built.processor, scratch, max_shard_size, left_out)
            target.mkdir(exist_ok=True)
            for pattern in _WEIGHT_FILES:
                for old in target.glob(pattern):
                    old.unlink()
            # safetensors leaves files that only their owner may read; the folder says who else may.
            readable = target.stat().st_mode & 0o666
            for written in Path(scratch).iterdir():
                if written.is_file():
                    written.chmod(readable)
                _replace(written, target / written.name)
    except (OSError, SafetensorError) as error:
        raise BuildError(_why_not_written(error, target)) from error


def _replace(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(source, target)


def _why_not_written(error: Exception, target: Path) -> str:
    # safetensors' own error class carries the system's number in its words only.
    text = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if number in {errno.ENOSPC, errno.EDQUOT} or f"os error {errno.ENOSPC}" in text or "No space left" in text:
        return f"there is no space left to write the model to {target}: free some, or choose another --save_path"
    return f"the model cannot be written to {target} ({text}): choose another --save_path"

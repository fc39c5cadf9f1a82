"""From what training left on disk to one Hugging Face folder: read the weights, fit them in, merge LoRA, save."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError

from utils.checkpoints.builder import (
    BuildError,
    BuiltModel,
    TrainingRecipe,
    inject_lora,
    load_weights_into,
    merge_lora,
    save_model,
)
from utils.checkpoints.published_export import find_differences, published_config, published_state
from utils.checkpoints.published_extras import EXTRAS_FOLDER
from utils.checkpoints.tensor_files import INDEX_NAMES, WHOLE_NAMES, StoredTensors, open_tensors, read_all, weight_files
from utils.checkpoints.trainable_token_rows import join_tables
from utils.cli.atomic_files import open_atomic_folder

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
        return read_all(open_tensors(place))
    if not place.is_dir():
        raise BuildError(f"--weight {path} does not exist: give the file or folder that zero_to_fp32.py wrote")
    if weight_files(place) is not None:
        return read_all(open_tensors(place))
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


def find_lora(weights: dict[str, torch.Tensor], source: str) -> tuple[int, str] | None:
    """(rank, layer names joined by commas) of the LoRA in a state dict, or None; BuildError if ranks differ."""
    found = {match["layer"]: int(value.shape[0]) for name, value in weights.items() if (match := _LORA_A.search(name))}
    if not found:
        return None
    if len(set(found.values())) > 1:
        raise BuildError(f"{source} holds LoRA of several ranks ({found}): expected one rank for all layers")
    return next(iter(found.values())), ",".join(sorted(found))


def load_and_merge(
    built: BuiltModel,
    weights: dict[str, torch.Tensor],
    source: str,
    lora_alpha: int,
    frozen: StoredTensors | None = None,
) -> int:
    """Put trained weights into a model strictly and merge the LoRA among them, whose rank and layers they tell.

    Args:
        frozen: the base's tensors, from which comes what the weights lack because training held it quantised; the whole
            numbers that stand for such in the weights are not taken.

    Returns:
        The number of layers merged.

    Raises:
        BuildError: names a tensor that is missing, superfluous or of another shape.
    """
    lora = find_lora(weights, source)
    if lora is not None:
        rank, layers = lora
        recipe = TrainingRecipe(lora_r=rank, lora_alpha=lora_alpha, lora_dropout=0.0, lora_target_modules=layers)
        inject_lora(built.model, recipe)
    if frozen:
        weights = {name: value for name, value in weights.items() if value.is_floating_point()}
        missing_keys = [name for name in built.model.state_dict() if name not in join_tables(weights)]
        base_names = {name: name.replace(".base_layer.", ".") for name in missing_keys}
        weights |= {name: frozen[theirs].read() for name, theirs in base_names.items() if theirs in frozen}
    load_weights_into(built.model, weights, source)
    return merge_lora(built.model)


def export_model(
    built: BuiltModel, folder: str | Path, max_shard_size: str = "5GB", left_out: tuple[str, ...] = ()
) -> None:
    """Save model, processor and their code; `folder` gets them only when all of it is written.

    Weights of an earlier export in `folder` are replaced. left_out: as in `save_model`. Raises BuildError when there is
    no space or no permission.
    """

    def save(scratch: Path) -> None:
        save_model(built.model, built.processor, scratch, max_shard_size, left_out, built.published)

    _write_folder(folder, save)


def export_published(built: BuiltModel, folder: str | Path, max_shard_size: str = "5GB") -> list[str]:
    """Save a model in the layout in which PixelLM was published, without its vision tower.

    Returns:
        Sentences about what the reader of the folder should know.

    Raises:
        BuildError: the model has numbers that the original code has otherwise, all of which are told, or the folder
            cannot be written.
    """
    unlike = find_differences(built.model, built.processor, built.published)
    if unlike:
        raise BuildError(
            "the original code would give other results, because it has these numbers fixed: "
            f"{'; '.join(unlike)}. Train with --token_fusion constant --scale_fusion constant from a published PixelLM"
        )
    state, made_up = published_state(built.model, built.published)
    rows = len(state["model.embed_tokens.weight"])
    config = published_config(built.model.config, built.processor, built.published, rows, built.model.dtype)

    def save(scratch: Path) -> None:
        _save_shards(state, scratch, max_shard_size)
        _save_tokenizer(built, scratch)
        (scratch / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    _write_folder(folder, save)
    remarks = ["the vision tower is not in it: the original code takes it from --vision-tower"]
    if made_up:
        remarks.append(f"{len(made_up)} tensors that no number depends on were made up, such as {made_up[-1]}")
    return remarks


def _save_shards(state: dict[str, torch.Tensor], folder: Path, max_shard_size: str) -> None:
    """pytorch_model.bin, whole or in shards with their index: what the original code's transformers reads."""
    pattern = "pytorch_model{suffix}.bin"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        torch.save({name: state[name].contiguous().clone() for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _save_tokenizer(built: BuiltModel, folder: Path) -> None:
    """The tokenizer's files as they were published, or our own."""
    kept = built.published.files if built.published is not None else {}
    if any(name.startswith("tokenizer") for name in kept):
        for name, content in kept.items():
            (folder / name).write_bytes(content)
    else:
        built.processor.tokenizer.save_pretrained(folder)


def _write_folder(folder: str | Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a new folder, and put what it wrote into `folder` when all of it is there."""
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise BuildError(f"--save_path {folder} is a file: give a folder")
    try:
        with open_atomic_folder(target) as scratch:
            save(scratch)
            for pattern in _WEIGHT_FILES:
                for old in target.glob(pattern):
                    old.unlink()
            if (target / EXTRAS_FOLDER).is_dir():
                shutil.rmtree(target / EXTRAS_FOLDER)
    except (OSError, SafetensorError) as error:
        raise BuildError(_why_not_written(error, target)) from error


def _why_not_written(error: Exception, target: Path) -> str:
    # safetensors' own error class carries the system's number in its words only.
    text = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if number in {errno.ENOSPC, errno.EDQUOT} or f"os error {errno.ENOSPC}" in text or "No space left" in text:
        return f"there is no space left to write the model to {target}: free some, or choose another --save_path"
    return f"the model cannot be written to {target} ({text}): choose another --save_path"

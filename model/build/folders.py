"""What stands in a folder on disk: configs, weights, tokenizers, whole transformers models, or one sentence why not."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

UNREADABLE = (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


class BuildError(ValueError):
    """A model cannot be built as asked; the message is one sentence for the user."""

    user_message = True


def first_sentence(error: BaseException) -> str:
    """What went wrong: our own words whole; of a library's the first sentence, which advice and lists follow."""
    if getattr(type(error), "user_message", False):
        return str(error)
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Leave out its reports, which list every tensor of a CLIP that is not its tower; ours name what matters."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def local_folder(path: str, flag: str) -> Path:
    """A folder that a flag names; BuildError where it is none."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise BuildError(
            f"{flag} {path!r} is not a folder on this machine, and no hub is reached from here: download the model "
            "and give its folder"
        )
    return folder


def read_config(folder: Path, flag: str) -> PretrainedConfig:
    """The config of a model's folder; BuildError where there is none, or none that transformers knows."""
    if not (folder / "config.json").is_file():
        raise BuildError(
            f"{flag} {folder} holds no config.json: expected the folder of a model in transformers' layout"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(
            f"{folder / 'config.json'} is not a config this program can use: {first_sentence(error)}"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise BuildError(
            f"{folder} holds no tokenizer that can be read ({first_sentence(error)}): copy its files"
        ) from error


def load_whole(
    auto_class: Any,
    folder: Path,
    flag: str,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    attn_implementation: str,
) -> tuple[PreTrainedModel, list[str]]:
    """A transformers model with all of its tensors.

    Returns:
        The model, and the names of tensors in the folder that it has no place for.

    Raises:
        BuildError: a file cannot be read; a tensor is missing, of another shape, or not finite.
    """
    try:
        with quiet_transformers():
            model, loading = auto_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back by name, and are refused below
            )
    except UNREADABLE as error:
        raise BuildError(
            f"{flag} {folder} holds no weights that can be read ({first_sentence(error)}): copy it again"
        ) from error
    broken = [
        name for name, value in model.state_dict().items() if value.is_floating_point() and not value.isfinite().all()
    ]
    for names, problem in (
        (sorted(loading["missing_keys"]), "is missing"),
        (sorted(f"{name} {list(found)}" for name, found, _ in loading["mismatched_keys"]), "does not fit its config"),
        (broken, "holds values that are not finite"),
    ):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise BuildError(f"{flag} {folder}: tensor {names[0]} {problem}{more}: copy the model again")
    return model, sorted(loading["unexpected_keys"])

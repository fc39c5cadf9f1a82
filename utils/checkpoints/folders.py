"""What stands in a folder on disk: configs, weights, tokenizers, whole transformers models, or one sentence why not."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AddedToken, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import logging

from model.structures import PixelLMError

UNREADABLE = (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)

SENTENCEPIECE = "tokenizer.model"
_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class BuildError(PixelLMError):
    """A model cannot be built as asked."""


def first_sentence(error: BaseException) -> str:
    """What went wrong: our own words whole; of a library's the first sentence, which advice and lists follow."""
    if isinstance(error, PixelLMError):
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
    """The tokenizer of a model's folder.

    A sentencepiece model without a tokenizer.json beside it is read as Llama, LLaVA and PixelLM read it when they were
    published; today's transformers would make other ids of leading spaces, or of every text.

    Raises:
        BuildError: there is none, or its files cannot be read or contradict each other.
    """
    try:
        if (folder / SENTENCEPIECE).is_file() and not (folder / "tokenizer.json").is_file():
            return _sentencepiece_tokenizer(folder)
        with quiet_transformers():  # it warns of every config.json of a kind that it does not know
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except BuildError:
        raise
    except Exception as error:  # the tokenizers library raises Exception itself
        raise BuildError(
            f"{folder} holds no tokenizer that can be read ({first_sentence(error)}): copy its files"
        ) from error


def _sentencepiece_tokenizer(folder: Path) -> Any:
    settings = _read_settings(folder / "tokenizer_config.json")
    special = {name: _token_text(settings.get(name)) or default for name, default in _SPECIAL_TOKENS.items()}
    pad = _token_text(_read_settings(folder / "special_tokens_map.json").get("pad_token") or settings.get("pad_token"))
    tokenizer = SentencePieceBackend(
        vocab_file=str(folder / SENTENCEPIECE),
        legacy=settings.get("legacy", True) is not False,
        **special,
        **({"pad_token": pad} if pad else {}),
    )
    added = dict(_read_settings(folder / "added_tokens.json"))
    added |= {_token_text(entry): int(number) for number, entry in settings.get("added_tokens_decoder", {}).items()}
    for content, number in sorted(added.items(), key=lambda item: item[1]):
        if content not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(content, normalized=False, special=True)], special_tokens=True)
        if tokenizer.convert_tokens_to_ids(content) != number:
            raise BuildError(
                f"{folder}: the added token {content!r} has the id {number} in its files, but "
                f"{tokenizer.convert_tokens_to_ids(content)} after {SENTENCEPIECE}: copy all files from one place"
            )
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none, or none that can be read: those who need it say so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _token_text(entry: Any) -> Any:
    """A special token, written as a text or as a record of one."""
    return entry.get("content") if isinstance(entry, dict) else entry


def load_pretrained(
    auto_class: Any, folder: Path, flag: str, config: PretrainedConfig
) -> tuple[PreTrainedModel, list[str]]:
    """A transformers model with all of its tensors, in the type they are stored in.

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
                dtype="auto",
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

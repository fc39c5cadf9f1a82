"""Tensors in files, read one at a time: safetensors and PyTorch's own files, whole or in shards.

Files are mapped into memory, so that what is read takes no memory of its own until it is copied or changed.
"""

import json
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from utils.checkpoints.folders import BuildError, first_sentence
from utils.checkpoints.torch_file_index import TEXT_OPCODES, first_lost, old_file_places

# The names under which DeepSpeed, the plain engine and transformers leave weights in a folder; an index comes first.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_NAMES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS = ".safetensors"
_SHARD_PATTERNS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
# What the readers raise where single bytes of a file are wrong: a pickle's bytes are a program.
_DAMAGED = (
    *(SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, MemoryError, struct.error),
)
_PIECE = 1 << 20  # numbers looked at together: large temporaries leave holes between the tensors of a model


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    name: what the file calls it. place: the file. shape: of what `read` returns. read: reads it, or makes it of what is
    read; the result may be a view of the file and must not be changed.
    """

    name: str
    place: Path
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def made(self, shape: Iterable[int], change: Callable[[torch.Tensor], torch.Tensor]) -> "StoredTensor":
        """The same tensor, changed after it is read, which gives it `shape`."""
        return StoredTensor(self.name, self.place, tuple(shape), lambda: change(self.read()))


Stored = dict[str, StoredTensor]


def weight_files(folder: Path) -> list[Path] | None:
    """The files with a folder's weights, or None where it holds none.

    Raises:
        BuildError: an index cannot be read or names a file that is absent, or shards have no index.
    """
    for index in (folder / name for name in INDEX_NAMES):
        if index.is_file():
            return [index.parent / name for name in dict.fromkeys(_weight_map(index).values())]
    for whole in (folder / name for name in WHOLE_NAMES):
        if whole.is_file():
            return [whole]
    for pattern, index_name in zip(_SHARD_PATTERNS, INDEX_NAMES, strict=True):
        if any(folder.glob(pattern)):
            raise BuildError(f"{folder} holds shards of weights but no {index_name}: copy all of the folder")
    return None


def stored_in(place: Path) -> Stored:
    """The tensors of a file, or of a folder's weight files, by the names they have there.

    Raises:
        BuildError: there are none, or a file is cut off, is not a file of tensors, or would run code when read.
    """
    if place.is_file():
        return _file(place, [])
    files = weight_files(place)
    if files is None:
        raise BuildError(
            f"{place} holds no weights: expected {', '.join(WHOLE_NAMES)} or one of their shard indices in it"
        )
    expected: dict[Path, list[str]] = {file: [] for file in files}
    for index in (place / name for name in INDEX_NAMES):
        if index.is_file():
            for name, shard in _weight_map(index).items():
                expected[place / shard].append(name)
            break
    tensors: Stored = {}
    for file, names in expected.items():
        found = _file(file, names)
        absent = [name for name in names if name not in found]
        if absent:
            raise BuildError(
                f"tensor {absent[0]!r} is missing from {file}, where the index says it is: copy the folder again"
            )
        tensors |= found
    return tensors


def all_finite(value: torch.Tensor) -> bool:
    """Whether every number is one, looked at in pieces: no mask of the whole is made."""
    if not value.is_floating_point():
        return True
    return all(bool(piece.isfinite().all()) for piece in value.reshape(-1).split(_PIECE))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = set(found.values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BuildError(f"{index} is not an index of weights: copy the folder again") from error
    for shard in sorted(shards, key=str):
        name = str(shard)
        if Path(name).name != name or not (index.parent / name).is_file():
            first = next(tensor for tensor, file in found.items() if file == shard)
            raise BuildError(
                f"{index} names the shard {name!r}, which is not beside it (tensor {first!r} is in it): "
                "copy all of the folder"
            )
    return found


def _file(path: Path, expected: list[str]) -> Stored:
    """The tensors of a file. expected: names that an index says are in it."""
    return _safetensors(path, expected) if path.suffix == SAFETENSORS else _pytorch(path, expected)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a file that is not whole into one sentence."""
    try:
        yield
    except BuildError:
        raise
    except _DAMAGED as error:
        why = first_sentence(error)[:200] or "it ends too early"
        raise BuildError(f"{path} is not a whole file of weights ({why}): export or copy it again") from error


def _refuse_cut_off(path: Path, expected: list[str]) -> None:
    with _whole(path):
        name = first_lost(path, expected)
    if name is not None:
        raise BuildError(f"{path} is cut off: tensor {name!r} is not whole in it; copy it again")


# --- safetensors --------------------------------------------------------------------------------------------------


def _safetensors(path: Path, expected: list[str]) -> Stored:
    _refuse_cut_off(path, expected)
    with _whole(path), safe_open(path, framework="pt") as opened:
        names = list(opened.keys())
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    return {name: StoredTensor(name, path, shapes[name], _reader(path, name)) for name in names}


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with _whole(path), safe_open(path, framework="pt") as opened:
            return opened.get_tensor(name)

    return read


# --- PyTorch's own files ------------------------------------------------------------------------------------------


def _pytorch(path: Path, expected: list[str]) -> Stored:
    is_archive = is_zipfile(path)
    if not is_archive:
        _refuse_cut_off(path, expected)
    weights = _load(path, is_archive)
    if not is_archive:
        weights = _placed(path, weights)
    return {name: StoredTensor(name, path, tuple(value.shape), _holder(value)) for name, value in weights.items()}


def _placed(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that have shapes only, over the numbers of a file of old PyTorch, which torch itself does not map."""
    places = old_file_places(path)
    by_tensor = {id(weights[name]): place for name, place in places.items() if name in weights}
    content = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    placed = {}
    for name, like in weights.items():
        place = by_tensor.get(id(like))
        if place is None:
            raise BuildError(
                f"{path}: tensor {name!r} cannot be found in this file of an old PyTorch: load and save it again with "
                "today's"
            )
        with _whole(path):
            numbers = content[place : place + like.untyped_storage().nbytes()]
            placed[name] = torch.empty(0, dtype=like.dtype).set_(
                numbers, like.storage_offset(), like.shape, like.stride()
            )
    return placed


def _holder(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value


def _load(path: Path, is_archive: bool) -> dict[str, torch.Tensor]:
    """The tensors of a file: mapped from an archive, shapes without numbers from another."""
    where = "cpu" if is_archive else "meta"
    try:
        with _whole(path):
            weights = torch.load(path, map_location=where, weights_only=True, mmap=is_archive)
    except BuildError as error:
        code = _asked_for(path, error.__cause__)
        if code is None:
            raise
        raise BuildError(
            f"{path} is not a whole file of weights and nothing else: it asks for {code}, which could run code, and "
            "was refused unread; take safetensors, or a file that holds tensors only"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BuildError(f"{path} does not hold tensors by name: expected a state dict, as zero_to_fp32.py writes it")
    return weights


def _asked_for(path: Path, error: BaseException | None) -> str | None:
    """What a refused pickle wanted to call; None for a file that is merely broken."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found.group(1) if found else _first_global(path)


def _first_global(path: Path) -> str | None:
    """The first thing that a bare pickle calls, read off its opcodes."""
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in TEXT_OPCODES:
                    texts.append(str(argument))
                elif opcode.name in {"GLOBAL", "INST"}:
                    return str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    return ".".join(texts[-2:])
    except (ValueError, IndexError, UnicodeDecodeError):
        return None
    return None


def as_dict(tensors: Stored) -> dict[str, Any]:
    """All tensors at once, as copies where they would change the file's mapping; for callers that want a state dict."""
    return {name: stored.read() for name, stored in tensors.items()}

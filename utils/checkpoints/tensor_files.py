"""Tensors in files, read one at a time: safetensors and PyTorch's own files, whole or in shards.

Files are mapped into memory, so that what is read takes no memory of its own until it is copied or changed.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open

from utils.checkpoints.folders import BuildError, first_sentence

# The names under which DeepSpeed, the plain engine and transformers leave weights in a folder; an index comes first.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_NAMES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS = ".safetensors"
_SHARD_PATTERNS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
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

    def change(self, shape: Iterable[int], make: Callable[[torch.Tensor], torch.Tensor]) -> "StoredTensor":
        """The same tensor, changed by `make` after it is read, which gives it `shape`."""
        return StoredTensor(self.name, self.place, tuple(shape), lambda: make(self.read()))


StoredTensors = dict[str, StoredTensor]


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


def open_tensors(place: Path) -> StoredTensors:
    """The tensors of a file, or of a folder's weight files, by the names they have there.

    Raises:
        BuildError: there are none, or a file is not a whole file of tensors, or would run code when read.
    """
    if place.is_file():
        return _open_file(place)
    files = weight_files(place)
    if files is None:
        raise no_weights(place)
    index = next((place / name for name in INDEX_NAMES if (place / name).is_file()), None)
    tensors: StoredTensors = {}
    for file in files:
        tensors |= _open_file(file)
    for name, shard in _weight_map(index).items() if index else ():
        if name not in tensors:
            raise BuildError(
                f"tensor {name!r} is missing from {place / shard}, where the index says it is: copy the folder again"
            )
    return tensors


def no_weights(place: Path) -> BuildError:
    """The error for a folder without weights."""
    return BuildError(
        f"{place} holds no weights: expected {', '.join(WHOLE_NAMES)} or one of their shard indices in it"
    )


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


def _open_file(path: Path) -> StoredTensors:
    return _open_safetensors(path) if path.suffix == SAFETENSORS else _open_pytorch(path)


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a file that is not whole into one sentence."""
    try:
        yield
    except Exception as error:  # a pickle's bytes are a program: where some are wrong, its reader fails in any way
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise BuildError(
                f"{path} is not a whole file of weights and nothing else: it asks for {asked[1]}, which could run "
                "code, and was refused unread; take safetensors, or a file that holds tensors only"
            ) from error
        why = first_sentence(error)[:200] or "it ends too early"
        raise BuildError(f"{path} is not a whole file of weights ({why}): export or copy it again") from error


def _open_safetensors(path: Path) -> StoredTensors:
    with _explain(path), safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(name: str) -> torch.Tensor:
        with _explain(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return {name: StoredTensor(name, path, shape, partial(read, name)) for name, shape in shapes.items()}


def _open_pytorch(path: Path) -> StoredTensors:
    """Mapped into memory, but for files of PyTorch before 1.6, which torch reads whole."""
    with _explain(path):
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BuildError(f"{path} does not hold tensors by name: expected a state dict, as zero_to_fp32.py writes it")
    return store_tensors(weights, path)


def store_tensors(weights: Mapping[str, torch.Tensor], place: str | Path) -> StoredTensors:
    """Tensors that are in memory already, or mapped, as if they were read from `place`."""
    return {
        name: StoredTensor(name, Path(place), tuple(value.shape), partial(_same, value))
        for name, value in weights.items()
    }


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def read_all(tensors: StoredTensors) -> dict[str, torch.Tensor]:
    """All tensors at once, for callers that want a state dict; they may be views of their files."""
    return {name: stored.read() for name, stored in tensors.items()}

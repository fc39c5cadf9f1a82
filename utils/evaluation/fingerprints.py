"""What was scored: short hashes that change when a model's weights or a data set's annotations do."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.data.readers.base import Reader

# Files up to this size are read whole; of larger ones the beginning, which holds the header of a safetensors file, the
# size, and blocks spread evenly: seconds rather than minutes for a large model, and training changes every block.
_WHOLE = 64 << 20
_BLOCK, _BLOCKS = 1 << 20, 32

_WEIGHTS = ("*.safetensors", "*.bin", "config.json")


def of_model(folder: str | Path) -> dict[str, Any]:
    """{"sha256": of names, sizes and contents of config.json and the weights, "bytes": of all, "files": names}.

    Files over 64 MiB count with 32 MiB of their content.
    """
    paths = sorted(path for pattern in _WEIGHTS for path in Path(folder).glob(pattern))
    hashed, total = hashlib.sha256(), 0
    for path in paths:
        size = path.stat().st_size
        total += size
        hashed.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                hashed.update(file.read())
                continue
            for number in range(_BLOCKS):
                file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                hashed.update(file.read(_BLOCK))
    return {"sha256": hashed.hexdigest(), "bytes": total, "files": [path.name for path in paths]}


def of_data(readers: Iterable[Reader]) -> list[dict[str, Any]]:
    """Of every reader its data set, split, number of images, fingerprint, and what it left out by cause."""
    return [
        {
            "dataset": reader.name,
            "split": reader.split,
            "images": len(reader),
            "fingerprint": reader.fingerprint,
            "left_out": dict(sorted(reader.skipped.items())),
        }
        for reader in readers
    ]

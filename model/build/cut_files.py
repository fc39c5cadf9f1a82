"""Which tensor a file that was cut off lost, told without reading one: a download that ended early is told by its name.

Nothing is unpickled: what a pickle names is read off its opcodes.
"""

import io
import json
import mmap
import pickletools
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import is_zipfile

from torch.serialization import MAGIC_NUMBER

LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, an old storage with that of its numbers
_HEAD = 1 << 24  # of an archive: its pickle is the first thing in it
_ARCHIVE, _PICKLE, _STORAGE = b"PK\x03\x04", b"\x80\x02", b"/data/"
_HEADER_NAME = re.compile(r'("(?:[^"\\]|\\.)+")\s*:\s*\{\s*"dtype"')
TEXT_OPCODES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "LONG", "INT"}
# Bytes of a number, by the class that its storage is pickled as.
_NUMBER_BYTES = {
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
    "torch ComplexFloatStorage": 8,
    "torch ComplexDoubleStorage": 16,
    "torch.storage UntypedStorage": 1,
}

Opcodes = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class _Storage:
    """The numbers of a tensor in a pickle: name of the first tensor that they are of, kind of storage, how many."""

    name: str
    kind: str
    count: int


def first_lost(path: Path, expected: Sequence[str]) -> str | None:
    """The first tensor that is not whole in a file of weights; None where all are, or the file is of no kind known.

    Args:
        expected: names that an index says are in the file, for what was cut before the file tells its own.
    """
    size = path.stat().st_size
    if not size:
        return _first(expected)
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES + 1)
        file.seek(0)
        if start[LENGTH_BYTES:] == b"{":
            return _lost_in_safetensors(file, size, expected)
        if start.startswith(_ARCHIVE):
            return None if is_zipfile(file) else _lost_in_archive(file, expected)
        return _lost_in_old_file(file, size, expected)


def _first(names: Sequence[str]) -> str | None:
    return next(iter(names), None)


def _lost_in_safetensors(file: IO[bytes], size: int, expected: Sequence[str]) -> str | None:
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    data = size - LENGTH_BYTES - length
    if data < 0:
        begun = file.read().decode("utf-8", errors="replace")
        return _first([json.loads(name) for name in _HEADER_NAME.findall(begun)]) or _first(expected)
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    ends = {name: entry["data_offsets"] for name, entry in header.items()}
    return _first([name for name in sorted(ends, key=lambda name: ends[name]) if ends[name][1] > data])


def _lost_in_archive(file: IO[bytes], expected: Sequence[str]) -> str | None:
    """For an archive without its end. Records stand one after the other: only the last that begins may be cut."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        head = content[:_HEAD]
        storages, begun = _storages(_opcodes(io.BytesIO(head[head.find(_PICKLE) :])))
        key, at = "", content.find(_STORAGE)
        seen: set[str] = set()
        while at >= 0:
            found = re.match(rb"\d+", content[at + len(_STORAGE) : at + len(_STORAGE) + 20])
            if found and (number := found.group().decode()) not in seen:  # the list at the end names them all again
                key = number
                seen.add(key)
            at = content.find(_STORAGE, at + 1)
    if key in storages:
        return storages[key].name
    return _first([storage.name for storage in storages.values()]) or _first(expected) or begun


def _lost_in_old_file(file: IO[bytes], size: int, expected: Sequence[str]) -> str | None:
    """Files of PyTorch before 1.6: five pickles (a mark, a version, the machine, the tensors, the keys of their
    storages), and then the storages in the order of their keys, each a count of numbers and the numbers.
    """
    if MAGIC_NUMBER not in [argument for _, argument in _opcodes(file)]:
        return None
    for _ in range(2):
        list(_opcodes(file))
    storages, begun = _storages(_opcodes(file))
    last = list(_opcodes(file))
    if not last or last[-1][0] != "STOP":
        return _first([storage.name for storage in storages.values()]) or _first(expected) or begun
    keys = [argument for opcode, argument in last if opcode in TEXT_OPCODES]
    end = file.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None or storage.kind not in _NUMBER_BYTES:
            return None
        end += LENGTH_BYTES + storage.count * _NUMBER_BYTES[storage.kind]
        if end > size:
            return storage.name
    return None


def _opcodes(file: IO[bytes]) -> Opcodes:
    """(opcode, argument) of the next pickle in a file, down to its end or to where the file ends."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            yield opcode.name, argument
    except (ValueError, IndexError, struct.error):
        return


def _storages(opcodes: Opcodes) -> tuple[dict[str, _Storage], str | None]:
    """The storages of a pickled state dict by their keys, in its order, and the first text in it.

    A tensor is pickled as its name and then ("storage", its kind, its key, its device, how many numbers).
    """
    storages: dict[str, _Storage] = {}
    memo: dict[int, tuple[str, str]] = {}
    texts: list[str] = []
    kind, count = "", 0
    last: tuple[str, str] | None = None
    for opcode, argument in opcodes:
        if opcode in {"BINPUT", "LONG_BINPUT"}:
            if last is not None:
                memo[argument] = last
            last = None
            continue
        got = memo.get(argument) if opcode in {"BINGET", "LONG_BINGET"} else None
        last = got or ((opcode, str(argument)) if opcode in TEXT_OPCODES or opcode == "GLOBAL" else None)
        if last is not None and last[0] == "GLOBAL":
            kind = last[1]
        elif last is not None:
            texts.append(last[1])
        elif opcode in _INTEGERS:
            count = int(argument)
        elif opcode == "BINPERSID" and len(texts) > 3:
            storages.setdefault(texts[-2], _Storage(texts[-4], kind, count))
    return storages, _first(texts)

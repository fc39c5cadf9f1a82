"""Where in a file of weights its tensors lie, and which of them it lost where it was cut off, without reading one.

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
TEXT_OPCODES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"}
_MEMO_PUTS, _MEMO_GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
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
class _Pickled:
    """What a pickled state dict names.

    storages: for every key of one, its kind and how many numbers it holds, in order. owners: the key of each tensor's
    storage; of tensors that are one and the same, only the first is there. first: the first text in it.
    """

    storages: dict[str, tuple[str, int]]
    owners: dict[str, str]
    first: str | None

    def name_of(self, key: str) -> str:
        """The first tensor whose numbers a storage holds."""
        return next(name for name, owner in self.owners.items() if owner == key)

    def name(self, expected: Sequence[str]) -> str | None:
        """A tensor that is in it, as well as can be told."""
        return _first([*self.owners]) or _first(expected) or self.first


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
        pickled = _read_off(_opcodes(io.BytesIO(head[head.find(_PICKLE) :])))
        last, at = "", content.find(_STORAGE)
        seen: set[str] = set()
        while at >= 0:
            found = re.match(rb"\d+", content[at + len(_STORAGE) : at + len(_STORAGE) + 20])
            if found and (key := found.group().decode()) not in seen:  # the list at the end names them all again
                last = key
                seen.add(key)
            at = content.find(_STORAGE, at + 1)
    return pickled.name_of(last) if last in pickled.storages else pickled.name(expected)


def _lost_in_old_file(file: IO[bytes], size: int, expected: Sequence[str]) -> str | None:
    found = _old_file(file)
    if found is None:
        return None
    pickled, places = found
    if places is None:
        return pickled.name(expected)
    for key, place in places.items():
        kind, count = pickled.storages[key]
        if place + count * _NUMBER_BYTES[kind] > size:
            return pickled.name_of(key)
    return None


def old_file_places(path: Path) -> dict[str, int]:
    """Where the storage of each tensor begins in a file of PyTorch before 1.6, in bytes; {} where that cannot be told.

    Of tensors that are one and the same, only the first is there.
    """
    with path.open("rb") as file:
        found = _old_file(file)
    if found is None:
        return {}
    pickled, places = found
    if places is None:
        return {}
    return {name: places[key] for name, key in pickled.owners.items()}


def _old_file(file: IO[bytes]) -> tuple[_Pickled, dict[str, int] | None] | None:
    """What a file of PyTorch before 1.6 names, and where its storages' numbers begin by their keys, in order.

    Such a file is five pickles (a mark, a version, the machine, the tensors, the keys of their storages), and then the
    storages in the order of their keys, each a count of numbers and the numbers.

    Returns:
        None for another kind of file, or one with a kind of storage that is not known; no places where the pickles are
        cut off.
    """
    if MAGIC_NUMBER not in [argument for _, argument in _opcodes(file)]:
        return None
    for _ in range(2):
        list(_opcodes(file))
    pickled = _read_off(_opcodes(file))
    last = list(_opcodes(file))
    if not last or last[-1][0] != "STOP":
        return pickled, None
    keys = [argument for opcode, argument in last if opcode in TEXT_OPCODES]
    places, place = {}, file.tell()
    for key in keys:
        kind, count = pickled.storages.get(key, ("", 0))
        if kind not in _NUMBER_BYTES:
            return None
        places[key] = place + LENGTH_BYTES
        place += LENGTH_BYTES + count * _NUMBER_BYTES[kind]
    return (pickled, places) if set(pickled.storages) == set(places) else None


def _opcodes(file: IO[bytes]) -> Opcodes:
    """(opcode, argument) of the next pickle in a file, down to its end or to where the file ends."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            yield opcode.name, argument
    except (ValueError, IndexError, struct.error):
        return


def _read_off(opcodes: Opcodes) -> _Pickled:
    """What is named in the opcodes of a pickled state dict.

    A tensor is pickled as its name and then ("storage", its kind, its key, its device, how many numbers). A text or
    kind that came before is taken from the memo.
    """
    storages: dict[str, tuple[str, int]] = {}
    owners: dict[str, str] = {}
    memo: dict[int, tuple[str, str]] = {}
    texts: list[str] = []
    kind, count = "", 0
    last: tuple[str, str] | None = None
    for opcode, argument in opcodes:
        if opcode in _MEMO_PUTS:
            if last is not None:
                memo[int(argument)] = last
            continue
        if opcode in _MEMO_GETS:
            last = memo.get(int(argument))
        else:
            last = (opcode, str(argument)) if opcode in TEXT_OPCODES or opcode == "GLOBAL" else None
        if last is not None and last[0] == "GLOBAL":
            kind = last[1]
        elif last is not None:
            texts.append(last[1])
        elif opcode in _INTEGERS:
            count = int(argument)
        elif opcode == "BINPERSID" and len(texts) > 3:
            storages.setdefault(texts[-2], (kind, count))
            owners.setdefault(texts[-4], texts[-2])
    return _Pickled(storages, owners, _first(texts))

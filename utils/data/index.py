"""Annotations in the form in which they are read: parsed once, kept in a file, mapped into memory by all who read them.

A file of records: MAGIC; the place of the table; the records one after another; the table, 8 bytes for the beginning of
each record and for the end of the last; facts about all of them as JSON. A record is a pickle of plain values, read by
an unpickler that admits nothing else. What lies in mapped memory is shared by all processes and counted for none.

An index is as old as the annotation files it was made of: it counts while their sizes and times of change are the same.
It is written under another name and then renamed, one process at a time, so that others see a whole one or none.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import mmap
import os
import pickle
import re
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from utils.cli.atomic_files import open_atomic
from utils.data.errors import DataError
from utils.data.files import hash_file
from utils.data.readers.pickles import unpickle_plain

logger = logging.getLogger(__name__)

INDEX_FOLDER = "PIXELLM_INDEX_DIR"
"""Variable of the environment that names the folder of indexes where --index_dir does not."""

_OWN_FOLDER = ".index"
"""Below the data root."""
_SMALL = 4 << 20
"""Bytes of annotations that are kept in memory instead: parsing them takes no time, and a copy of them no room."""

_MAGIC = b"PixelLM index 1\n"
_PLACE = struct.Struct("<Q")
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(slots=True)
class ParseNotes:
    """What parsing finds beside the records: what was left out and what is odd, by cause, and other plain facts."""

    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)


Parse = Callable[[ParseNotes], Iterable[Any]]
"""Yields the records, plain values (containers, numbers, text, bytes), and fills in the rest."""


@dataclass(frozen=True, slots=True)
class Source:
    """An annotation file as it was when it was parsed."""

    path: str
    size: int
    changed: int
    content: str = ""

    @classmethod
    def of(cls, path: str) -> "Source":
        """The file `path` as it is now, its content not looked at. DataError when it is not there."""
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); make it a readable file", cause="unreadable file"
            ) from error
        return cls(path, found.st_size, found.st_mtime_ns)

    def matches(self, other: dict[str, Any]) -> bool:
        """Whether an index that noted `other` was made of this."""
        return (self.size, self.changed) == (other["size"], other["changed"])

    def as_dict(self) -> dict[str, Any]:
        """For the facts; the name alone, because a data root may be mounted elsewhere."""
        return {
            "name": os.path.basename(self.path),
            "size": self.size,
            "changed": self.changed,
            "content": self.content,
        }


class RecordIndex(Sequence[Any]):
    """The records, in memory that is mapped, or of a small index in plain bytes. Each is unpickled when asked for.

    gathered: what parsing found beside them. fingerprint: changes when the annotation files do. path: where it lies,
    empty where it is in memory. Processes that are started afresh open the file again.
    """

    def __init__(self, content: bytes | mmap.mmap, path: str = "") -> None:
        self.path = path
        self._content = content
        view = memoryview(content)
        (place,) = _PLACE.unpack(view[len(_MAGIC) : len(_MAGIC) + _PLACE.size])
        (length,) = _PLACE.unpack(view[place : place + _PLACE.size])
        first = place + _PLACE.size
        self._table = view[first : first + (length + 1) * _PLACE.size].cast("Q")
        self._length = int(length)
        self.facts: dict[str, Any] = json.loads(bytes(view[first + (length + 1) * _PLACE.size :]))
        known = self.facts["gathered"]
        self.gathered = ParseNotes(Counter(known["skipped"]), Counter(known["noted"]), known["facts"])

    @classmethod
    def open(cls, path: str) -> "RecordIndex":
        """The index in the file `path`. OSError or ValueError where there is none, or not all of it."""
        with open(path, "rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} is no index")
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return cls(content, path)
        except (struct.error, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no whole index") from error

    @property
    def fingerprint(self) -> str:
        """The content hashes of the annotation files."""
        return " ".join(source["content"] for source in self.facts["sources"])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._length:
            raise IndexError(f"record {number} of {self._length}")
        try:
            return unpickle_plain(self._content[self._table[number] : self._table[number + 1]])
        except pickle.UnpicklingError as error:
            raise DataError(
                f"record {number} of the index {self.path} is damaged; delete the file, it is made again",
                cause="damaged index",
            ) from error

    def is_sound(self) -> bool:
        """Whether the records are those that were written: reads all of them."""
        (place,) = _PLACE.unpack(self._content[len(_MAGIC) : len(_MAGIC) + _PLACE.size])
        return _hash_range(self._content, len(_MAGIC) + _PLACE.size, place) == self.facts["records"]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path:
            return _reopen, (self.path, self.facts["sources"])
        return RecordIndex, (bytes(self._content),)


def open_index(
    name: str,
    layout: str,
    root: str,
    chosen_folder: str,
    sources: Sequence[str],
    parse: Parse,
    *,
    thorough: bool = False,
) -> RecordIndex:
    """The records of the annotation files `sources`, parsed now or earlier.

    Args:
        name: of the data set and split, unique below the data root `root`.
        layout: what the records look like; an index of another layout is made again.
        chosen_folder: where indexes are kept; empty: PIXELLM_INDEX_DIR, else .index in the data root, else, where that
            cannot be written, the user's cache folder.
        parse: gives the records.
        thorough: take an index only if the contents of the files are those it was made of, and its records as written.

    Raises:
        DataError: a file cannot be read or is malformed, changes meanwhile, or no folder can be written.
    """
    found = [Source.of(path) for path in sources]
    if sum(source.size for source in found) < _SMALL:
        return RecordIndex(_build_in_memory(layout, found, parse))
    places = [os.path.join(folder, _file_name(name)) for folder in _folders(root, chosen_folder)]
    for place in places:
        known = _open_valid(place, layout, found, thorough)
        if known is not None:
            return known
    place = _first_writable(places)
    with _only_one(f"{place}.lock", name):
        known = _open_valid(place, layout, found, thorough)  # another process may have made it meanwhile
        if known is None:
            logger.info(f"{name} is indexed, once, into {place}")
            _write(place, layout, found, parse)
            known = RecordIndex.open(place)
    return known


def _file_name(name: str) -> str:
    """`name` without signs that are special to some file system; what it loses by that, a hash gives back."""
    plain = re.sub(r"[^\w+.-]+", "_", name)
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.index"


def _folders(root: str, chosen: str) -> list[str]:
    """Where an index may lie, in the order in which it is looked for. What several roots share has a part for each."""
    part = hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:12]
    chosen = chosen or os.environ.get(INDEX_FOLDER, "")
    if chosen:
        return [os.path.join(chosen, part)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [os.path.join(root, _OWN_FOLDER), os.path.join(cache, "pixellm", "index", part)]


def _open_valid(place: str, layout: str, sources: Sequence[Source], thorough: bool) -> RecordIndex | None:
    """The index at `place` where it is there, whole, of this layout, and made of `sources` as they are."""
    try:
        index = RecordIndex.open(place)
    except (OSError, ValueError):
        return None
    known = index.facts["sources"]
    if index.facts["layout"] != layout or len(known) != len(sources):
        return None
    if not all(source.matches(one) for source, one in zip(sources, known, strict=True)):
        return None
    if thorough:
        contents = [hash_file(source.path) for source in sources]
        if contents != [one["content"] for one in known] or not index.is_sound():
            logger.warning(
                f"{place} does not fit its annotation files any more, whose size and time are the same: made again"
            )
            return None
    return index


def _first_writable(places: Sequence[str]) -> str:
    """The first of `places` whose folder can be written, with a word where that is not the first."""
    reasons = []
    for place in places:
        folder = os.path.dirname(place)
        try:
            os.makedirs(folder, exist_ok=True)
            with open(f"{place}.lock", "ab"):
                pass
        except OSError as error:
            if error.errno not in (*_READ_ONLY, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
                raise
            reasons.append(f"{folder} ({error.strerror})")
            continue
        if reasons:
            where = f"the index cannot be kept in {reasons[0]}: it is kept in {folder}"
            logger.warning(f"{where}; --index_dir or {INDEX_FOLDER} name another place")
        return place
    raise DataError(
        f"the index of the annotations cannot be kept in {' nor in '.join(reasons)}; expected a folder that can be "
        f"written: set --index_dir or {INDEX_FOLDER}",
        cause="no folder for the index",
    )


@contextlib.contextmanager
def _only_one(lock: str, name: str) -> Iterator[None]:
    """Held by one process of this machine, or of all that share the folder; others wait. Where the file system has no
    locks, each makes its own index and the last one stays.
    """
    with open(lock, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that indexes %s", name)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def _write(place: str, layout: str, sources: Sequence[Source], parse: Parse) -> None:
    """Make the index at `place`; one that is there stays until the new one is whole."""
    try:
        with open_atomic(place, "wb", sync=True) as stream:
            _write_records(stream, layout, sources, parse)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        raise DataError(
            f"the index {place} cannot be written ({error.strerror}); make room, or name another folder with "
            f"--index_dir or {INDEX_FOLDER}",
            cause="no folder for the index",
        ) from error


def _build_in_memory(layout: str, sources: Sequence[Source], parse: Parse) -> bytes:
    stream = io.BytesIO()
    _write_records(stream, layout, sources, parse)
    return stream.getvalue()


def _write_records(stream: IO[bytes], layout: str, sources: Sequence[Source], parse: Parse) -> None:
    gathered, hashed = ParseNotes(), hashlib.sha256()
    stream.write(_MAGIC + _PLACE.pack(0))
    begins = array("Q", [len(_MAGIC) + _PLACE.size])
    for record in parse(gathered):
        packed = pickle.dumps(record, protocol=5)
        stream.write(packed)
        hashed.update(packed)
        begins.append(begins[-1] + len(packed))
    place = begins[-1]
    padding = -place % _PLACE.size
    stream.write(b"\0" * padding)
    place += padding
    hashed.update(b"\0" * padding)
    stream.write(_PLACE.pack(len(begins) - 1))
    stream.write(begins.tobytes())
    facts = {
        "layout": layout,
        "sources": [_check_unchanged(source).as_dict() for source in sources],
        "records": hashed.hexdigest(),
        "gathered": {"skipped": gathered.skipped, "noted": gathered.noted, "facts": gathered.facts},
    }
    stream.write(json.dumps(facts).encode())
    stream.seek(len(_MAGIC))
    stream.write(_PLACE.pack(place))


def _check_unchanged(source: Source) -> Source:
    """`source` with the hash of its content. DataError when the file is another than before it was parsed."""
    content = hash_file(source.path)
    if Source.of(source.path) != source:
        raise DataError(f"{source.path} was changed while it was read; wait until it is complete, and start again")
    return Source(source.path, source.size, source.changed, content)


def _hash_range(content: bytes | mmap.mmap, first: int, end: int) -> str:
    hashed = hashlib.sha256()
    for start in range(first, end, 1 << 20):
        hashed.update(content[start : min(start + (1 << 20), end)])
    return hashed.hexdigest()


def _reopen(path: str, sources: list[dict[str, Any]]) -> RecordIndex:
    """In a process that was started afresh. DataError when the file is another by now."""
    try:
        index = RecordIndex.open(path)
    except (OSError, ValueError) as error:
        raise DataError(f"the index {path} is gone while it is needed ({error}); start again") from error
    if index.facts["sources"] != sources:
        raise DataError(f"the index {path} was made again while it is needed; start again")
    return index

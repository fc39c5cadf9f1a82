"""Which files and folders data sets need, and which of them are not there: told without reading annotations.

Each reader's module says what its data sets are made of (`needed_parts`); training and check_data.py both ask here.
"""

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.data.archives import archive_of

_LAID_OUT = "as dataset/README.md draws it"


@dataclass(frozen=True, slots=True)
class Mention:
    """A folder is needed only where the file `file` holds `text`; while there is no such file, if `otherwise`."""

    file: "Part"
    text: str
    otherwise: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """A file or a folder of the official layout.

    paths: below the data root, parted by "/"; any one of them will do, the first is looked for first. mention: what
    makes it needed, None where it always is.
    """

    paths: tuple[str, ...]
    is_folder: bool = False
    mention: Mention | None = None

    def needed(self, root: str) -> bool:
        """Whether what is below `root` needs it."""
        if self.mention is None:
            return True
        file = self.mention.file.found(root)
        return self.mention.otherwise if file is None else _holds(os.path.join(root, file), self.mention.text)

    def found(self, root: str) -> str | None:
        """The path, below `root`, of the first that is there; None where none is."""
        exists = os.path.isdir if self.is_folder else os.path.isfile
        return next((path for path in self.paths if exists(os.path.join(root, path))), None)


@dataclass(frozen=True, slots=True)
class Absence:
    """A part that is not there.

    data_set: which data set and split asks for it. path: where it was looked for. archive: what holds it, None where
    that is not known.
    """

    data_set: str
    path: str
    is_folder: bool
    archive: str | None

    @property
    def remedy(self) -> str:
        """What to do about it, in a few words."""
        return f"it comes with {self.archive}" if self.archive else f"put it there {_LAID_OUT}"


def file_part(*paths: str) -> Part:
    """A file, under any of `paths`."""
    return Part(paths)


def folder_part(*paths: str, mention: Mention | None = None) -> Part:
    """A folder, under any of `paths`."""
    return Part(paths, is_folder=True, mention=mention)


def absent_parts(root: str, data_set: str, parts: Iterable[Part]) -> list[Absence]:
    """Those of `parts` that are not below `root`, in order."""
    return [
        Absence(data_set, os.path.join(root, part.paths[0]), part.is_folder, archive_of(part.paths[0]))
        for part in parts
        if part.found(root) is None and part.needed(root)
    ]


def absence_table(absent: Sequence[Absence]) -> str:
    """A line per absent part: what asks for it, where it was looked for, what to do. A path is told once."""
    asking: dict[str, list[str]] = {}
    for one in absent:
        names = asking.setdefault(one.path, [])
        if one.data_set not in names:
            names.append(one.data_set)
    first = {one.path: one for one in reversed(absent)}
    rows = [(", ".join(names), _shown(first[path]), first[path].remedy) for path, names in asking.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)] if rows else [0, 0]
    return "\n".join(f"{names:{widths[0]}}  {path:{widths[1]}}  {remedy}" for names, path, remedy in rows)


def absence_sentence(absent: Sequence[Absence]) -> str:
    """What is missing in one sentence that names the first path; `absent` holds at least one."""
    first, others = absent[0], len({one.path for one in absent}) - 1
    kind = "the folder " if first.is_folder else ""
    source = f"it comes with {first.archive}: put it there" if first.archive else "put it there"
    more = f", and {others} more of what was asked for {'is' if others == 1 else 'are'} missing (the table above)"
    return (
        f"{kind}{first.path} is missing{more if others else ''}; {source} {_LAID_OUT}, leave the data set out, or set "
        f"--dataset_dir"
    )


def _holds(path: str, text: str) -> bool:
    """Whether the file holds `text`: a gigabyte is searched in less than a second. A file that cannot be opened, or
    holds nothing, mentions nothing: its reader tells what is wrong with it.
    """
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text.encode()) >= 0
    except (OSError, ValueError):
        return False


def _shown(absence: Absence) -> str:
    return absence.path + os.sep if absence.is_folder else absence.path

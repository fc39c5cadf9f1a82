"""Which files and folders data sets need, and which of them are not there: told without reading annotations.

Each reader's module says what its data sets are made of (`required_files`); training and check_data.py both ask here.
"""

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.data.archives import archive_of

_LAID_OUT = "as dataset/README.md draws it"


@dataclass(frozen=True, slots=True)
class RequiredIf:
    """A folder is needed only where the file `file` holds `text`; while there is no such file, if `otherwise`."""

    file: "RequiredPath"
    text: str
    otherwise: bool = True


@dataclass(frozen=True, slots=True)
class RequiredPath:
    """A file or a folder of the official layout.

    paths: below the data root, parted by "/"; any one of them will do, the first is looked for first. mention: what
    makes it needed, None where it always is.
    """

    paths: tuple[str, ...]
    is_folder: bool = False
    mention: RequiredIf | None = None

    def is_required(self, root: str) -> bool:
        """Whether what is below `root` needs it."""
        if self.mention is None:
            return True
        file = self.mention.file.find(root)
        return self.mention.otherwise if file is None else _holds(os.path.join(root, file), self.mention.text)

    def find(self, root: str) -> str | None:
        """The path, below `root`, of the first that is there; None where none is."""
        exists = os.path.isdir if self.is_folder else os.path.isfile
        return next((path for path in self.paths if exists(os.path.join(root, path))), None)


@dataclass(frozen=True, slots=True)
class MissingPath:
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


def required_file(*paths: str) -> RequiredPath:
    """A file, under any of `paths`."""
    return RequiredPath(paths)


def required_folder(*paths: str, mention: RequiredIf | None = None) -> RequiredPath:
    """A folder, under any of `paths`."""
    return RequiredPath(paths, is_folder=True, mention=mention)


def find_missing(root: str, data_set: str, parts: Iterable[RequiredPath]) -> list[MissingPath]:
    """Those of `parts` that are not below `root`, in order."""
    return [
        MissingPath(data_set, os.path.join(root, part.paths[0]), part.is_folder, archive_of(part.paths[0]))
        for part in parts
        if part.find(root) is None and part.is_required(root)
    ]


def missing_table(absent: Sequence[MissingPath]) -> str:
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


def missing_sentence(absent: Sequence[MissingPath]) -> str:
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


def _shown(one: MissingPath) -> str:
    return one.path + os.sep if one.is_folder else one.path

"""Files and folders that are there whole or not at all."""

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.cli.errors import UserError


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str], mode: str = "w", *, sync: bool = False) -> Iterator[IO[Any]]:
    """A new file that takes the place of `path` when the block ends without an error.

    Who reads meanwhile sees what was there before, never half a file. Text is UTF-8.

    Args:
        mode: "w" or "wb". sync: wait until the disk has it.

    Raises:
        OSError: it cannot be written.
    """
    draft = f"{os.fspath(path)}.{socket.gethostname()}.{os.getpid()}.draft"
    try:
        with open(draft, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def write_text(path: Path, content: str) -> None:
    """Write a text a person asked for, and the folders above it. UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; choose another place") from error


def write_json(path: Path, content: Any) -> None:
    """Write `content` with two spaces a level, and the folders above it where they are not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def open_atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder whose files and folders are moved into `path` when the block ends without an error.

    Files of the same names there are replaced; others stay. The files may be read by whoever may read the folder.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        yield Path(scratch)
        target.mkdir(exist_ok=True)
        for file in Path(scratch).rglob("*"):
            if file.is_file():
                file.chmod(target.stat().st_mode & 0o666)
        for entry in Path(scratch).iterdir():
            place = target / entry.name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            os.replace(entry, place)

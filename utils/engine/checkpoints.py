"""Checkpoint folders: <folder>/<tag>/…, and the tag that counts in <folder>/latest. The same for both engines."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.scripts import UserError

LATEST = "latest"
TAG_PREFIX = "step"
# How torch's own writer words what the operating system refused; it raises RuntimeError instead of OSError.
TORCH_WRITER = ("iostream error", "PytorchStreamWriter", "inline_container")


def tag_of(step: int) -> str:
    """The tag of a checkpoint made after `step` optimizer steps."""
    return f"{TAG_PREFIX}{step}"


def latest_tag(folder: Path) -> str | None:
    """The tag that counts, or None where there is no checkpoint."""
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    tag = pointer.read_text(encoding="utf-8").strip()
    return tag if tag and (folder / tag).is_dir() else None


def require_tag(folder: Path) -> str:
    """The tag that counts; UserError where there is none."""
    tag = latest_tag(folder)
    if tag is None:
        raise UserError(f"there is no checkpoint in {folder}: expected a file `{LATEST}` naming a folder beside it")
    return tag


def point_to(folder: Path, tag: str) -> None:
    """Make `tag` the one that counts, in one step."""
    fresh = folder / f"{LATEST}.new"
    fresh.write_text(tag, encoding="utf-8")
    fresh.replace(folder / LATEST)


def remove_others(folder: Path) -> None:
    """Delete the tags that no longer count; nothing where no tag counts."""
    keep = latest_tag(folder)
    if keep is None:
        return
    for other in folder.iterdir():
        if other.is_dir() and other.name != keep and other.name.startswith(TAG_PREFIX):
            shutil.rmtree(other)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around writing a checkpoint folder `place`: where the system refuses, removes it and says why as UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_WRITER):
            raise
        shutil.rmtree(place, ignore_errors=True)
        reason = getattr(error, "strerror", None) or "the disk took only part of it"
        free = shutil.disk_usage(place.parent if place.parent.is_dir() else Path.cwd()).free
        raise UserError(
            f"cannot write the checkpoint {place}: {reason} ({free / 2**30:.1f} GiB are free there); an earlier one is "
            "kept: make room, then the same command goes on"
        ) from error


def _link_or_copy(source: str, target: str) -> None:
    """A second name for the same bytes where the file system can; checkpoint files are never written in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def keep_as(folder: Path, other: Path) -> None:
    """Make `other` hold the checkpoint that counts in `folder`, with the scripts beside it, and nothing else."""
    tag = require_tag(folder)
    other.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(other / tag, ignore_errors=True)
    shutil.copytree(folder / tag, other / tag, copy_function=_link_or_copy)
    for script in folder.glob("*.py"):
        shutil.copy2(script, other / script.name)
    point_to(other, tag)
    remove_others(other)

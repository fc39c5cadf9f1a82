"""Checkpoint folders: <folder>/<tag>/… with a manifest in each, and <folder>/latest. The same for both engines.

A checkpoint is written under another name, brought to the disk, given a manifest with the sizes and checksums of its
files, read back, and only then renamed, pointed to, and followed by the removal of what it succeeds. Killed anywhere, a
run leaves the checkpoint before it as it was.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.cli.atomic_files import open_atomic
from utils.cli.errors import UserError

LATEST = "latest"
MANIFEST = "manifest.json"
TAG_PREFIX = "step"
WRITING, REPLACED = ".writing", ".replaced"
# How torch's own writer words what the operating system refused; it raises RuntimeError instead of OSError.
TORCH_WRITER = ("iostream error", "PytorchStreamWriter", "inline_container")
_TAG = re.compile(rf"{TAG_PREFIX}(\d+)")
CHUNK = 1 << 22  # bytes


def tag_for(step: int) -> str:
    """The tag of a checkpoint made after `step` optimizer steps."""
    return f"{TAG_PREFIX}{step}"


def step_of(tag: str) -> int | None:
    """The number of optimizer steps in a tag, None where it is no tag."""
    found = _TAG.fullmatch(tag)
    return int(found[1]) if found else None


def tags(folder: Path) -> list[str]:
    """The finished checkpoints of a folder, whole or not, the newest first; those after `latest` last.

    What comes after `latest` is of a run that was given up, or was not pointed to any more before its run was killed.
    """
    if not folder.is_dir():
        return []
    steps = sorted((step for entry in folder.iterdir() if (step := step_of(entry.name)) is not None), reverse=True)
    latest = latest_step(folder)
    if latest is not None:
        steps = [step for step in steps if step <= latest] + [step for step in steps if step > latest]
    return [tag_for(step) for step in steps]


def latest_step(folder: Path) -> int | None:
    """The step that `latest` names, whether or not its checkpoint is there; None without a readable one."""
    try:
        return step_of((folder / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None


def latest_tag(folder: Path) -> str | None:
    """The tag that counts, or None where there is no checkpoint."""
    step = latest_step(folder)
    return tag_for(step) if step is not None and (folder / tag_for(step)).is_dir() else None


def require_tag(folder: Path) -> str:
    """The tag that counts; UserError where there is none."""
    tag = latest_tag(folder)
    if tag is None:
        raise UserError(f"there is no checkpoint in {folder}: expected a file `{LATEST}` naming a folder beside it")
    return tag


def set_latest(folder: Path, tag: str) -> None:
    """Make `tag` the one that counts, in one step."""
    with open_atomic(folder / LATEST, sync=True) as file:
        file.write(tag)
    fsync_path(folder)


def fsync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_of(place: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, in order of names."""
    return sorted(path for path in place.rglob("*") if path.is_file() and path != place / MANIFEST)


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(place: Path) -> None:
    """Write the manifest of a checkpoint: size in bytes and checksum of every file."""
    files = {
        path.relative_to(place).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum(path)}
        for path in files_of(place)
    }
    with open_atomic(place / MANIFEST, sync=True) as file:
        json.dump({"files": files}, file, indent=1)


def find_problem(place: Path) -> str | None:
    """Why a checkpoint is not as it was written, in a few words; None where it is."""
    try:
        listed = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in listed.items():
            size = (place / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size:,} of {facts['bytes']:,} bytes"
            if checksum(place / name) != facts["sha256"]:
                return f"the bytes of {name} are not those that were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or place).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def newest_verified(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The newest checkpoint that verifies, None without one; and why each was passed over, by tag."""
    skipped: dict[str, str] = {}
    for tag in tags(folder):
        why = find_problem(folder / tag)
        if why is None:
            return tag, skipped
        skipped[tag] = why
    return None, skipped


def checkpoint_bytes(place: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in files_of(place))


def require_space(folder: Path, needed: int) -> None:
    """UserError where the disk of an existing `folder` has less than `needed` bytes to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space for a checkpoint in {folder}: it takes about {needed / 2**30:.2f} GiB, and "
            f"{free / 2**30:.2f} GiB are free; earlier ones are kept: make room, then the same command goes on"
        )


def prepare_scratch(place: Path) -> Path:
    """An empty folder to write the checkpoint `place` into; what killed runs left half written is removed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for entry in place.parent.iterdir():
        if entry.is_dir() and entry.name.startswith(TAG_PREFIX) and entry.name.endswith((WRITING, REPLACED)):
            shutil.rmtree(entry)
    scratch = place.with_name(place.name + WRITING)
    scratch.mkdir()
    return scratch


def publish(scratch: Path, place: Path) -> None:
    """Seal, read back, name and point to a checkpoint whose files are all on the disk. UserError if it is not whole."""
    write_manifest(scratch)
    fsync_path(scratch)
    why = find_problem(scratch)
    if why is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(
            f"the checkpoint {place} was not written as it should be: {why}; earlier ones are kept: look at the disk"
        )
    if place.exists():
        place.replace(place.with_name(place.name + REPLACED))
    scratch.replace(place)
    fsync_path(place.parent)
    set_latest(place.parent, place.name)


def remove_superseded(folder: Path, keep_last: int = 1) -> None:
    """Delete all but the last `keep_last` checkpoints; nothing where no tag counts.

    A run that goes on from an earlier step, or starts anew, gives up what was made after that step: such goes too.
    """
    if latest_tag(folder) is None:
        return
    latest = latest_step(folder) or 0
    ordered = tags(folder)
    kept = {tag for tag in ordered[:keep_last] if (step_of(tag) or 0) <= latest}
    doomed = [tag for tag in ordered if tag not in kept]
    doomed += [entry.name for entry in folder.glob(f"{TAG_PREFIX}*{REPLACED}")]
    for name in doomed:
        shutil.rmtree(folder / name)


@contextmanager
def explain_write_errors(place: Path) -> Iterator[None]:
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


def copy_checkpoint(folder: Path, other: Path) -> None:
    """Make `other` hold the checkpoint that counts in `folder`, with the scripts beside it, and nothing else."""
    tag = require_tag(folder)
    with explain_write_errors(other / (tag + WRITING)):
        scratch = prepare_scratch(other / tag)
        shutil.copytree(folder / tag, scratch, copy_function=_link_or_copy, dirs_exist_ok=True)
        for script in folder.glob("*.py"):
            shutil.copy2(script, other / script.name)
        if (other / tag).exists():
            (other / tag).replace(other / (tag + REPLACED))
        scratch.replace(other / tag)
        fsync_path(other)
        set_latest(other, tag)
        remove_superseded(other)

"""Locks of DeepSpeed's compiled parts that a killed run left: the next start would wait for them for ever, silently."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from utils.cli.errors import UserError

logger = logging.getLogger(__name__)

PATTERN = "deepspeed_*/lock"
PATIENCE = 60.0  # seconds
# Whoever is done closes a lock shortly before removing it.
SECOND_LOOK = 0.5


def clear_stale_locks(
    first: bool, root: Path | None = None, is_held: Callable[[Path], bool] | None = None, patience: float = PATIENCE
) -> None:
    """Take away the locks that nobody holds, and say so. UserError where one stays.

    first: whether this is the one of the ranks on this machine that does it; the others wait for it.
    root: torch's folder of compiled extensions. is_held: whether a process has a file open. patience: in seconds.
    """
    folder = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    held = is_held or _is_open_somewhere
    deadline = time.monotonic() + patience
    for lock in [*folder.glob(PATTERN), *folder.glob(f"*/{PATTERN}")]:
        while not held(lock) and _stays(lock) and not held(lock):
            if first:
                _remove(lock)
            elif time.monotonic() > deadline:
                raise UserError(
                    f"{lock} was left by a run that was killed, and DeepSpeed would wait for it for ever: remove it"
                )


def _stays(lock: Path) -> bool:
    if lock.exists():
        time.sleep(SECOND_LOOK)
    return lock.exists()


def _remove(lock: Path) -> None:
    try:
        lock.unlink()
    except OSError as error:
        raise UserError(
            f"{lock} was left by a run that was killed, DeepSpeed would wait for it for ever, and it cannot be removed "
            f"({error.strerror}): remove it by hand"
        ) from error
    logger.warning(f"removed {lock}, which a run that was killed had left: DeepSpeed would have waited for it for ever")


def _is_open_somewhere(path: Path) -> bool:
    """Whether a process of this machine has a file open; whoever compiles keeps its lock open."""
    wanted = os.path.realpath(path)
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(handle) == wanted:
                return True
        except OSError:
            continue  # that process, or that file, has gone, or is another user's
    return False

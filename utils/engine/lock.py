"""One run in a folder at a time, and one folder for all of a run's processes."""

import secrets
from pathlib import Path

from filelock import FileLock, Timeout

from utils.cli.errors import UserError
from utils.engine.base import Engine

LOCK, TOKEN = "run.lock", ".shared"
# Data workers of a killed run share its lock, and end within 5 seconds of it.
PATIENCE = 6.0

_locks: dict[Path, FileLock] = {}  # a lock that nobody refers to is released


def lock_folder(folder: Path) -> None:
    """Lock a run's folder until this process ends. UserError where another has it, or where it cannot be written."""
    path = folder.absolute() / LOCK
    if path in _locks:
        return
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"{folder} is in use by another run: wait for it, end it, or choose another --exp_name"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {folder / LOCK}: {error.strerror}; choose another --log_base_dir") from error
    _locks[path] = lock


def require_shared_folder(folder: Path, engine: Engine) -> None:
    """UserError where a rank does not see what rank 0 writes into `folder`, so that checkpoints would be torn apart.

    All ranks call this together.
    """
    if engine.world_size == 1:
        return
    path = folder / TOKEN
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    engine.barrier()
    seen = engine.gather(path.read_text(encoding="utf-8") if path.is_file() else "")
    blind = [rank for rank, token in enumerate(seen) if token != seen[0]]
    if engine.rank == 0:
        path.unlink()
    if blind:
        raise UserError(
            f"rank {blind[0]} does not see what rank 0 writes into {folder}: give a --log_base_dir that all nodes share"
        )

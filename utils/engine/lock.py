"""One run in a folder at a time, and one folder for all of a run's processes."""

import fcntl
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO

from utils.cli.errors import UserError
from utils.engine.base import Engine

LOCK, TOKEN = "run.lock", ".shared"

# Open files: the system takes a lock back when its file is closed, at the latest when the process ends.
_held: dict[Path, IO[str]] = {}


def lock_folder(folder: Path) -> None:
    """Hold a run's folder until this process ends. UserError where another has it, or where it cannot be written.

    A record lock belongs to the process that took it, so that data workers which outlive a killed run do not hold it.
    """
    path = folder.absolute() / LOCK
    if path in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder / LOCK}: {error.strerror}; choose another --log_base_dir") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = _describe(file.read())
        file.close()
        raise UserError(
            f"{folder} is in use by another run ({holder}): wait for it, end it, or choose another --exp_name"
        ) from None
    file.truncate(0)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}))
    file.flush()
    _held[path] = file


def _describe(written: str) -> str:
    try:
        holder = json.loads(written)
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "which has not said yet which"


def require_shared(folder: Path, engine: Engine) -> None:
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

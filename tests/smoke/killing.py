"""Run as a program: trains as told, one run after the other, with processes that may kill themselves on the way.

It imports once and forks the ranks of every run, as a launcher would start them. A place to kill is the number of an
event: every call that the engine's code or torch's writing of files makes is one, so that a number drawn at random may
fall between two steps, in a step, or anywhere in a checkpoint: half a file, before or after a rename.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import train_ds
from utils.cli.errors import run_script
from utils.engine import saving
from utils.engine.runtime import deepspeed_problem

ROOT = Path(__file__).resolve().parents[2]
ENGINE, WRITER = str(ROOT / "utils" / "engine"), "torch/serialization.py"
# What torch's writer calls for every tensor says less than what it calls for every file and record.
WRITERS = {"_save", "_legacy_save", "__init__", "__exit__"}
PATIENCE = 900.0  # seconds
# What a rank under DeepSpeed would import by itself, for most of the time that a short run takes.
IMPORTED_ONCE = (
    "utils.engine.deepspeed_engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
)


@dataclass
class Job:
    """One start of train_ds.py. kill: (rank, number of the event), or None to run to the end.

    fails: the rank raises an error at that event instead of being killed, and all ranks write into the log of rank 0.
    counted: whether events are counted, which slows a run down several times over; a run that is to be killed does.
    """

    flags: list[str]
    log: str
    ranks: int = 1
    kill: tuple[int, int] | None = None
    fails: bool = False
    counted: bool = False


@dataclass
class Outcome:
    """statuses: of the ranks, -9 for a killed one. apart: seconds from the first to the last rank's end.

    events: how many there were on each rank, where they were counted; saves: those between which checkpoints were made.
    """

    statuses: list[int]
    apart: float
    events: list[int]
    saves: list[list[int]]


class Events:
    """Counts them, and ends this process, or its work, at the one it was told."""

    def __init__(self, at: int | None, fails: bool) -> None:
        self.at, self.fails, self.count, self.saves = at, fails, 0, list[int]()
        save = saving.save_checkpoint

        def marked(*args: Any, **kwargs: Any) -> Path:
            self.saves.append(self.count)
            try:
                return save(*args, **kwargs)
            finally:
                self.saves.append(self.count)

        sys.modules["utils.engine.fit"].save_checkpoint = marked  # type: ignore[attr-defined]

    def start(self) -> None:
        """From here on every call is looked at. Most are of no interest and cost as little as can be."""
        ours: dict[str, bool] = {}

        def look(frame: FrameType, event: str, argument: object) -> None:
            if event != "call" and event != "c_call":
                return
            code = frame.f_code
            name = code.co_filename
            if name not in ours:
                ours[name] = name.startswith(ENGINE) or name.endswith(WRITER)
            if ours[name] and (code.co_name in WRITERS or not name.endswith(WRITER)):
                self.seen(frame, argument)

        sys.setprofile(look)

    def seen(self, frame: FrameType, argument: object) -> None:
        self.count += 1
        if self.count == self.at and self.fails:
            raise ArithmeticError(f"an error at event {self.count}")
        if self.count == self.at:
            called = getattr(argument, "__qualname__", frame.f_code.co_name)
            sys.stderr.write(f"\nkilled at event {self.count}: {called}, {frame.f_code.co_name}:{frame.f_lineno}\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def rank_of(job: Job, rank: int, port: int) -> int:
    """One rank, in a process of its own; returns its status."""
    log = f"{job.log}.rank{0 if job.fails else rank}"
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if job.ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.ranks), LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    at = job.kill[1] if job.kill is not None and job.kill[0] == rank else None
    if not job.counted and at is None:
        return run_script(train_ds.main, job.flags)
    events = Events(at, job.fails)
    events.start()
    try:
        status = run_script(train_ds.main, job.flags)
    finally:
        sys.setprofile(None)
    Path(f"{job.log}.events{rank}").write_text(json.dumps([events.count, events.saves]))
    return status


def forked(call: Callable[[], int]) -> int:
    """A child that ends with what `call` returns; its process number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = call()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: Job) -> Outcome:
    """Start every rank, and wait for all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [forked(lambda rank=rank: rank_of(job, rank, port)) for rank in range(job.ranks)]
    statuses: dict[int, int] = {}
    deadline, ends = time.monotonic() + PATIENCE, list[float]()
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                ends.append(time.monotonic())
        if time.monotonic() > deadline:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    found = []
    for rank in range(job.ranks):
        path = Path(f"{job.log}.events{rank}")
        found.append(json.loads(path.read_text()) if path.is_file() else [0, []])
        path.unlink(missing_ok=True)
    return Outcome(
        [statuses[child] for child in children], ends[-1] - ends[0], [f[0] for f in found], [f[1] for f in found]
    )


def main() -> None:
    """A job as a line of JSON on stdin, its outcome as a line on stdout, until an empty line."""
    for name in IMPORTED_ONCE if deepspeed_problem(torch.device("cpu")) is None else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        if not line.strip():
            break
        print(json.dumps(asdict(run(Job(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main()

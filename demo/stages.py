"""A run made of stages, each a command of its own: visible while it runs, timed, stoppable, repeatable by hand."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from model.structures import PixelLMError
from utils.engine.runtime import deepspeed_problem

# Seconds a stage gets after each signal before the next, sterner one.
PATIENCE = ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: short, one word; the key of its seconds.
        title: what it does, for the person watching.
        command: program and arguments; never goes through a shell.
        cwd: where it runs.
        env: variables set for it on top of the caller's.
        typed: what it reads from its standard input.
    """

    name: str
    title: str
    command: Sequence[str]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    typed: str = ""

    def repeat(self) -> str:
        """The line that runs this stage again from any folder."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.env.items()]
        typed = f"printf %s {shlex.quote(self.typed)} | " if self.typed else ""
        return f"cd {shlex.quote(str(self.cwd))} && {typed}{' '.join([*settings, shlex.join(self.command)])}"


class StageFailed(PixelLMError):
    """A stage ended with another exit status than 0. `status` is what a script should exit with."""

    def __init__(self, stage: Stage, status: int) -> None:
        self.stage, self.status = stage, status if 0 < status < 256 else 1
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        super().__init__(f"stage '{stage.name}' {how}; its own message stands above. To repeat it:\n  {stage.repeat()}")


@contextmanager
def _terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, so that there is one way out of a stage."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_stage(stage: Stage) -> float:
    """Run it to its end, its output going where ours goes; returns its wall seconds.

    The stage and all its children form one process group, which an interruption takes down as a whole, ranks included.

    Raises:
        StageFailed: the exit status was not 0, or the program is not there.
        KeyboardInterrupt: Ctrl-C or SIGTERM; nothing of the stage is left running.
    """
    start = time.perf_counter()
    sys.stdout.flush()
    with _terminate_is_interrupt():
        try:
            with _readable(stage.typed) as typed:
                process = subprocess.Popen(
                    list(stage.command),
                    cwd=stage.cwd,
                    env={**os.environ, **stage.env},
                    stdin=typed,
                    start_new_session=True,
                )
        except OSError as error:
            print(f"cannot start {stage.command[0]}: {error}", file=sys.stderr)
            raise StageFailed(stage, 127) from error
        try:
            status = process.wait()
        except BaseException:
            _take_down(process)
            raise
    if status:
        raise StageFailed(stage, status)
    return time.perf_counter() - start


@contextmanager
def _readable(text: str) -> Iterator[IO[bytes]]:
    """A file that is read as `text`, for a process to start with."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode("utf-8"))
        file.seek(0)
        yield file


def _take_down(process: "subprocess.Popen[bytes]") -> None:
    """End the process group of `process`, asking first."""
    for number, seconds in PATIENCE:
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        # The leader is gone; a rank may have outlived it, and gets no second asking.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return


class Stages:
    """Runs stages one after the other, says which is on, and keeps their seconds.

    Args:
        count: how many stages will come, for "[2/7]".
    """

    def __init__(self, count: int) -> None:
        self.count, self.seconds = count, dict[str, float]()
        self._start = time.perf_counter()

    def run(self, stage: Stage) -> None:
        """Announce and run one stage; its wall seconds are kept under its name. Raises as `run_stage` does."""
        with self.timed(stage.name, stage.title):
            print(f"    {shlex.join(stage.command)}", flush=True)
            run_stage(stage)

    @contextmanager
    def timed(self, name: str, title: str) -> Iterator[None]:
        """Announce and time a stage that is no command of its own."""
        print(f"\n[{len(self.seconds) + 1}/{self.count}] {name}: {title}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        print(f"    {name} took {self.seconds[name]:.0f} s, {self.total():.0f} s since the start", flush=True)

    def total(self) -> float:
        """Wall seconds since these stages began."""
        return time.perf_counter() - self._start


def choose_engine() -> str:
    """ "deepspeed", or "plain" where that cannot run here, which is said in one line."""
    problem = deepspeed_problem(torch.device("cpu"))
    if problem is None:
        return "deepspeed"
    print(f"{problem}: training with the plain engine, in one process")
    return "plain"


def launcher(engine: str, ranks: int) -> tuple[str, ...]:
    """What stands in front of a training script: python, or DeepSpeed's launcher, its ranks meeting on a free port."""
    if engine == "plain":
        return (sys.executable,)
    program = str(Path(sys.executable).with_name("deepspeed"))
    return program, "--num_gpus", str(ranks), "--master_port", str(free_port())


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]

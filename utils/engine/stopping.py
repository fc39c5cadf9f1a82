"""Being asked to stop: by a signal, or by the end of the launcher that would have passed one on."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Under a launcher one request arrives more than once: from whoever sent it to the whole group, and from the launcher.
ECHO_SECONDS = 2.0


class StopRequest:
    """Remembers that this process was asked to stop; asked again, ends it at once.

    why: what asked, None as long as nothing did. launched: whether another process started this one and others like it.
    """

    def __init__(self, launched: bool) -> None:
        self.why: str | None = None
        self._echo = ECHO_SECONDS if launched else 0.0
        self._asked = 0.0
        self._ancestors = _ancestors() if launched else []
        self._saved: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are requests; afterwards they do what they did before."""
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def may_be_left(self, line: str) -> Iterator[None]:
        """Inside, nothing is lost by stopping: the first request already ends the process, with status 0 and `line`."""
        self._saved = line
        try:
            if self.why is not None:
                self._leave()
            yield
        finally:
            self._saved = None

    def asked(self) -> bool:
        """Whether to stop, because of a signal or because nobody is left who could send one."""
        if self.why is None and self._ancestors and _ancestors() != self._ancestors:
            self.why = "the end of its launcher"
        return self.why is not None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.why is None:
            self.why, self._asked = name, now
            if self._saved is not None:
                self._leave()
        elif now - self._asked >= self._echo:
            sys.stderr.write(f"\n{name} again: leaving at once\n")
            sys.stderr.flush()
            os._exit(128 + number)

    def _leave(self) -> None:
        if self._saved:
            sys.stderr.write(f"\n{self._saved.format(why=self.why)}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def under_launcher() -> bool:
    """Whether torchrun or DeepSpeed's launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


def _ancestors() -> list[int]:
    """The launcher's process number, and under DeepSpeed's, which comes in two parts, that of its front part too."""
    found = [os.getppid()]
    if "CROSS_RANK" in os.environ:
        found.append(_parent_of(found[0]))
    return found


def _parent_of(process: int) -> int:
    """The parent's process number; 0 where the system does not tell."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0

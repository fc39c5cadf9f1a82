"""Being asked to stop: by a signal, or by the end of the launcher that would have passed one on."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.cli.logs import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# One request may arrive more than once: sent to the whole group, and passed on by the launcher.
ECHO_SECONDS, LAUNCHED_ECHO_SECONDS = 0.2, 2.0


class StopRequest:
    """Remembers that this process was asked to stop; asked again, ends it at once.

    reason: what asked, None as long as nothing did. launched: whether another process started this one and its peers.

    Signals are read by a thread: the main one may be waiting for a peer, where Python's handlers do not run.
    """

    def __init__(self, launched: bool) -> None:
        self.reason: str | None = None
        self._echo = LAUNCHED_ECHO_SECONDS if launched else ECHO_SECONDS
        self._asked = 0.0
        self._ancestors = _ancestors() if launched else []
        self._nothing_is_lost: str | None = None

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Inside, signals are requests; afterwards they do what they did before."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        old_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.signal(number, _leave_to_the_thread) for number in SIGNALS}
        listener = threading.Thread(target=self._listen, args=(reading,), daemon=True)
        listener.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_wakeup)
            os.close(writing)
            listener.join(timeout=1.0)

    @contextmanager
    def exit_on_request(self, line: str) -> Iterator[None]:
        """Inside, nothing is lost by stopping: the first request already ends the process, with status 0.

        line: what rank 0 says then, "{reason}" in it standing for what asked.
        """
        self._nothing_is_lost = line
        try:
            if self.reason is not None:
                self._leave()
            yield
        finally:
            self._nothing_is_lost = None

    def is_requested(self) -> bool:
        """Whether to stop, because of a signal or because nobody is left who could send one."""
        if self.reason is None and self._ancestors and _ancestors() != self._ancestors:
            self.reason = "the end of its launcher"
        return self.reason is not None

    def _listen(self, reading: int) -> None:
        while received := os.read(reading, 64):
            for number in received:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))
        os.close(reading)

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._asked = number.name, now
            if self._nothing_is_lost is not None:
                self._leave()
        elif now - self._asked >= self._echo:
            sys.stderr.write(f"\n{number.name} again: leaving at once\n")
            sys.stderr.flush()
            os._exit(128 + number)

    def _leave(self) -> None:
        if self._nothing_is_lost and rank() == 0:
            sys.stderr.write("\n" + self._nothing_is_lost.replace("{reason}", str(self.reason)) + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Python's own handler; the signal's number has already been written to the pipe."""


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

"""A program in a pseudo-terminal: keys go in, and what it writes is waited for, however long a busy machine takes."""

import codecs
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

PATIENCE = 180.0  # seconds; only a program that is stuck takes so long
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


def own_terminal() -> None:
    """Called by a program that leads its session: the terminal it reads from becomes its own, so that keys send it
    signals.
    """
    os.close(os.open(os.ttyname(0), os.O_RDWR))


class Screen:
    """A running program and all it has written. The program calls `own_terminal` first if Ctrl-C shall reach it."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path, columns: int = 80, rows: int = 24
    ) -> None:
        self._keyboard, terminal = pty.openpty()
        self.resize(columns, rows)
        self.program = subprocess.Popen(
            list(command), stdin=terminal, stdout=terminal, stderr=terminal, env=env, cwd=cwd, start_new_session=True
        )
        os.close(terminal)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.written = ""
        self._seen = 0

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.program.poll() is None:
            self.program.kill()
            self.program.wait()
        os.close(self._keyboard)

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size, in letters."""
        fcntl.ioctl(self._keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Send keys; what is no UTF-8 in them (lone surrogates of 0x80..0xff) goes as the byte it stands for."""
        left = keys.encode("utf-8", "surrogateescape")
        while left:
            left = left[os.write(self._keyboard, left) :]

    def enter(self, line: str) -> None:
        """Type a line and end it."""
        self.press(line + ENTER)

    def wait_for(self, text: str) -> str:
        """What was written since the last wait, up to and with `text`; AssertionError when it does not come."""
        deadline = time.monotonic() + PATIENCE
        while (place := self.written.find(text, self._seen)) < 0:
            assert self._read(deadline), f"waited for {text!r}; written instead: {self.written[-3000:]!r}"
        begin, self._seen = self._seen, place + len(text)
        return self.written[begin : self._seen]

    def end(self) -> int:
        """The exit status of a program that is leaving."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.program.wait(PATIENCE)

    def _read(self, deadline: float) -> bool:
        """Take what is there; False when the program has closed its terminal or the time is over."""
        ready, _, _ = select.select([self._keyboard], [], [], max(0.0, deadline - time.monotonic()))
        try:
            piece = os.read(self._keyboard, 65536) if ready else b""
        except OSError:  # how Linux says that nobody holds the other end any more
            piece = b""
        self.written += self._decoder.decode(piece)
        return bool(piece)

"""chat.py in a real pseudo-terminal: what a person sees and types."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from model.build.builder import save_model
from tests.unit.tiny_pixellm import make_model, noise

SECONDS = 240  # that a word may take to appear, on a machine that does other things


class Person:
    """Types into a program and reads what it writes, in a window of `columns` letters a line."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, columns: int) -> None:
        self.screen, inside = pty.openpty()
        self.resize(columns)
        self.program = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=env, cwd=cwd, start_new_session=True
        )
        os.close(inside)
        self.seen = ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def types(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def sees(self, text: str) -> str:
        """Everything written since the last call, up to and with `text`."""
        end = time.monotonic() + SECONDS
        while text not in self.seen:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, end - time.monotonic()))
            try:
                piece = os.read(self.screen, 65536) if ready else b""
            except OSError:  # the program has left
                piece = b""
            if not piece:
                raise AssertionError(f"{text!r} did not come; what came: {self.seen[-2000:]!r}")
            self.seen += piece.decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def leaves(self) -> int:
        try:
            return self.program.wait(SECONDS)
        finally:
            os.close(self.screen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = make_model()
    place = tmp_path_factory.mktemp("terminal") / "model"
    save_model(built.model, built.processor, place)
    return place


def test_a_person_in_a_terminal(folder: Path, tmp_path: Path, repository: Path, child_env: dict[str, str]) -> None:
    """Colours, several turns, Ctrl-C while an answer is made, a narrow window, all kinds of letters, end of input."""
    hostile = tmp_path / "pic\x1b]0;owned\x07ture.png"
    Image.fromarray(noise(20, 30)).save(hostile)
    env = child_env | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    env.pop("NO_COLOR", None)
    flags = ["--version", str(folder), f"--vis_save_path={tmp_path / 'vis'}", "--max_new_tokens=200"]
    person = Person([sys.executable, "chat.py", *flags, "--image", str(hostile)], env, repository, 100)
    person.sees("Question: ")
    person.types("wo ist der rote Kreis? 日本 é\n")
    person.sees("Answer: ")
    said = person.sees("Question: ")
    assert "overlay:" in said and "owned" in said
    # Of escape sequences only ours: colours and what line editing uses around the invitation.
    assert "\x1b]" not in said and "\x07" not in re.sub(r"\x1b\[\?\d+[hl]", "", said)
    person.types("/nonsense\n")
    person.sees("there is no command /nonsense")
    person.sees("Question: ")
    person.resize(10)
    person.types("and?\n")
    person.sees("Answer: ")
    os.killpg(person.program.pid, signal.SIGINT)  # what the terminal does on Ctrl-C
    said = person.sees("Question: ")
    assert "stopped" in said or "overlay:" in said  # the answer may have been done just before
    person.types("/undo\n")
    person.sees("Question: ")
    person.types("\x04")  # Ctrl-D: the end of input
    assert person.leaves() == 0

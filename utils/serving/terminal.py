"""What reaches a terminal: text without anything that could steer it, colours and small images where it has them."""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

import cv2
import numpy as np

from model.overlay import Colour

_PLAIN = "\x1b[0m"
_UPPER_HALF = "▀"  # two pixels of an image in one letter: its own colour above, the background's below
_MAX_COLUMNS, _MAX_ROWS, _MIN_COLUMNS = 72, 24, 16


def safe(text: str) -> str:
    """`text` with a space for everything that is not printed: escape sequences, line ends, marks that turn the
    direction of writing, halves of letters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def one_line(text: str) -> str:
    """The same without runs of spaces."""
    return " ".join(safe(text).split())


class Terminal:
    """Where a conversation is written.

    colours: whether 24-bit colours may be used: the stream is a terminal whose COLORTERM says so, and NO_COLOR is not
    set. interactive: whether a person types. echo: whether lines of a pipe are repeated, as a terminal shows what is
    typed.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        typed: TextIO | None = None,
        environment: Mapping[str, str] | None = None,
        echo: bool = False,
    ) -> None:
        self.out, typed = out or sys.stdout, typed or sys.stdin
        environment = os.environ if environment is None else environment
        able = environment.get("COLORTERM", "") in ("truecolor", "24bit") and environment.get("TERM") != "dumb"
        self.interactive = typed.isatty()
        self.echo = echo and not self.interactive
        self.colours = able and "NO_COLOR" not in environment and self.out.isatty()
        for stream in (self.out, typed):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def say(self, text: str, colour: Colour | None = None, end: str = "\n") -> None:
        """Write a text that may hold anything, on one line."""
        self.out.write(self._coloured(safe(text), colour) + end)
        self.out.flush()

    def show(self, image: np.ndarray) -> None:
        """Draw uint8 RGB (H, W, 3) in letters; nothing where there are no colours or no room."""
        columns, rows = shutil.get_terminal_size()
        columns, rows = min(columns, _MAX_COLUMNS), min(rows - 4, _MAX_ROWS)
        if not self.colours or columns < _MIN_COLUMNS or rows < 2:
            return
        height, width = image.shape[:2]
        scale = min(columns / width, 2 * rows / height)
        size = max(1, round(width * scale)), max(2, 2 * round(height * scale / 2))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        for upper, lower in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
            letters = [
                f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m{_UPPER_HALF}"
                for (a, b, c), (d, e, f) in zip(upper, lower, strict=True)
            ]
            self.out.write("".join(letters) + _PLAIN + "\n")
        self.out.flush()

    def read(self, invitation: str) -> str | None:
        """A line without blanks around it, None at the end of input. The invitation is for a person or an echo."""
        try:
            line = input(invitation if self.interactive else "").strip()
        except EOFError:
            if self.interactive:
                self.say("")
            return None
        if self.echo:
            self.say(f"{invitation}{line}")
        return line

    def _coloured(self, text: str, colour: Colour | None) -> str:
        if colour is None or not self.colours:
            return text
        red, green, blue = colour
        return f"\x1b[38;2;{red};{green};{blue}m{text}{_PLAIN}"

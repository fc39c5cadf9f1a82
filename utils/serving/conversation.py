"""A conversation with the keyboard or a pipe: questions, commands, answers while they are made."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.cli.errors import UserError, explain
from utils.serving.files import AnswerLike, Draw, check_image_name, free_name, target_lines, write_answer, write_page
from utils.serving.terminal import Colour, Terminal

HELP = """\
/image FILE   ask about another image
/masks        the last answer's masks again
/save FILE    the last answer's overlay into FILE, its masks beside it; or a page, if FILE ends in .html
/undo         take the last question back
/reset        forget the conversation, keep the image
/help         this list
/quit         leave; so does the end of input"""


class Talk(Protocol):
    """A conversation about one image, as a model's predictor offers it."""

    turns: list[tuple[str, Any]]
    num_forgotten: int

    def stream(self, question: str, max_new_tokens: int) -> Iterator[Any]: ...
    def undo(self) -> Any: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class Manner:
    """What a conversation needs of the model's room.

    open: image's path -> (its pixels uint8 (H, W, 3), a Talk about it). draw: see `files.Draw`. page: (image,
    answer) -> the answer as an HTML page. colour: of target number n. text, target, answer: read an event: its piece of
    text, the number of the target that begins with it, the whole answer; None for events of another kind.
    """

    open: Callable[[str], tuple[np.ndarray, Talk]]
    draw: Draw
    page: Callable[[np.ndarray, Any], str]
    colour: Callable[[int], Colour]
    text: Callable[[Any], str | None]
    target: Callable[[Any], int | None]
    answer: Callable[[Any], AnswerLike | None]


class Conversation:
    """Questions about an image, which may be changed. num_failed: lines that could not be done as asked."""

    def __init__(self, manner: Manner, terminal: Terminal, folder: Path, max_new_tokens: int) -> None:
        self.manner, self.terminal, self.folder, self.max_new_tokens = manner, terminal, folder, max_new_tokens
        self.image_path = ""
        self.image = np.zeros((0, 0, 3), np.uint8)
        self.talk: Talk | None = None
        self.last: AnswerLike | None = None
        self.num_failed = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self.take,
            "/masks": self._masks,
            "/save": self._save,
            "/undo": self._undo,
            "/reset": self._reset,
            "/help": lambda _: self._say_lines(HELP.splitlines()),
        }

    def take(self, image: str) -> None:
        """Talk about another image; errors pass through and leave the old one."""
        self.image, self.talk = self.manner.open(image)
        self.image_path, self.last = image, None

    def run(self) -> None:
        """Read lines until they end. What is wrong with one is said, then the next is read."""
        if self.terminal.interactive:
            self.terminal.say("Ask about the image; /help lists what else can be typed.")
        while (line := self.terminal.read("Question: " if self.talk else "Image: ")) is not None:
            if line == "/quit":
                return
            try:
                self._do(line)
            except KeyboardInterrupt:
                self.terminal.say("")
                self.terminal.say("stopped")
                self.num_failed += 1
            except Exception as error:
                sentence = explain(error)
                if sentence is None:
                    raise
                self.terminal.say(sentence)
                self.num_failed += 1

    def _do(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command in self._commands:
            self._commands[command](rest.strip())
        elif self.talk is None:
            self.take(line)
        elif command.startswith("/"):
            raise UserError(f"there is no command {command}: /help lists those there are")
        else:
            self._ask(self.talk, line)

    def _ask(self, talk: Talk, question: str) -> None:
        forgotten, begun = talk.num_forgotten, False
        for event in talk.stream(question, self.max_new_tokens):
            if not begun:
                self.terminal.say("Answer: ", end="")
                begun = True
            if (piece := self.manner.text(event)) is not None:
                self.terminal.say(piece, end="")
            elif (number := self.manner.target(event)) is not None and self.terminal.colours:
                self.terminal.say(f" [{number + 1}]", self.manner.colour(number), end="")
            elif (answer := self.manner.answer(event)) is not None:
                self.last = answer
        self.terminal.say("")
        if talk.num_forgotten > forgotten:
            self.terminal.say(
                f"  (the conversation was too long: its first {talk.num_forgotten} turn(s) are forgotten)"
            )
        assert self.last is not None
        self._keep(free_name(self.folder, self.image_path))

    def _keep(self, target: Path) -> None:
        answer = self._answered()
        write_answer(target, self.image, answer, self.manner.draw)
        self._list(answer, target)
        self.terminal.say(f"  overlay: {target}")

    def _list(self, answer: AnswerLike, target: Path | None) -> None:
        if len(answer.masks):
            self.terminal.show(self.manner.draw(self.image, answer.masks, answer.phrases))
        for number, line in enumerate(target_lines(answer, target)):
            self.terminal.say(line, self.manner.colour(number) if number < len(answer.masks) else None)

    def _say_lines(self, lines: list[str]) -> None:
        for line in lines:
            self.terminal.say(line)

    def _answered(self) -> AnswerLike:
        if self.last is None:
            raise UserError("there is no answer yet: ask something first")
        return self.last

    def _masks(self, _: str) -> None:
        answer = self._answered()
        if not len(answer.masks):
            raise UserError("the last answer has no masks: ask for something in the image")
        self._list(answer, None)

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file: give a name such as answer.png")
        answer, target = self._answered(), Path(name)
        if target.suffix.lower() == ".html":
            write_page(target, self.manner.page(self.image, answer))
        else:
            check_image_name(target, "/save")
            write_answer(target, self.image, answer, self.manner.draw)
        self.terminal.say(f"  saved: {target}")

    def _undo(self, _: str) -> None:
        taken = self.talk.undo() if self.talk else None
        if taken is None:
            raise UserError("there is nothing to take back: no question was answered yet")
        self.last = self.talk.turns[-1][1] if self.talk and self.talk.turns else None
        self.terminal.say(f"  taken back: {taken[0]}")

    def _reset(self, _: str) -> None:
        if self.talk:
            self.talk.reset()
        self.last = None
        self.terminal.say("  forgotten")

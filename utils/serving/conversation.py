"""A conversation with the keyboard or a pipe: questions, commands, answers while they are made."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from model.answers import Answer
from model.overlay import draw_overlay, target_colour
from model.predictor import Predictor
from model.session import AnswerOptions, Chat, Finished, TargetStarted, TextPiece
from utils.cli.atomic_files import write_text
from utils.cli.errors import UserError, explain
from utils.serving.answer_page import answer_page
from utils.serving.files import check_image_name, choose_free_name, describe_targets, write_answer
from utils.serving.terminal import Terminal

HELP = """\
/image FILE   ask about another image
/masks        the last answer's masks again
/save FILE    the last answer's overlay into FILE, its masks beside it; or a page, if FILE ends in .html
/undo         take the last question back
/reset        forget the conversation, keep the image
/help         this list
/quit         leave; so does the end of input"""


class Conversation:
    """Questions about an image, which may be changed. num_failed: lines that could not be done as asked."""

    def __init__(
        self, predictor: Predictor, options: AnswerOptions, terminal: Terminal, folder: Path, max_new_tokens: int
    ) -> None:
        """folder: where overlays and masks go."""
        self.predictor, self.options = predictor, options
        self.terminal, self.folder, self.max_new_tokens = terminal, folder, max_new_tokens
        self.image_path = ""
        self.image = np.zeros((0, 0, 3), np.uint8)
        self.chat: Chat | None = None
        self.last: Answer | None = None
        self.num_failed = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self.open_image,
            "/masks": self._masks,
            "/save": self._save,
            "/undo": self._undo,
            "/reset": self._reset,
            "/help": lambda _: self._say_lines(HELP.splitlines()),
        }

    def open_image(self, image: str) -> None:
        """Ask about another image; errors pass through and leave the old one."""
        session = self.predictor.session(image)
        self.image, self.chat = session.image, session.chat(self.options)
        self.image_path, self.last = image, None

    def run(self) -> None:
        """Read lines until they end. What is wrong with one is said, then the next is read."""
        if self.terminal.interactive:
            self.terminal.say("Ask about the image; /help lists what else can be typed.")
        while (line := self.terminal.read("Question: " if self.chat else "Image: ")) is not None:
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
        elif self.chat is None:
            self.open_image(line)
        elif command.startswith("/"):
            raise UserError(f"there is no command {command}: /help lists those there are")
        else:
            self._ask(self.chat, line)

    def _ask(self, chat: Chat, question: str) -> None:
        forgotten, begun = chat.num_forgotten, False
        for event in chat.stream(question, self.max_new_tokens):
            if not begun:
                self.terminal.say("Answer: ", end="")
                begun = True
            if isinstance(event, TextPiece):
                self.terminal.say(event.text, end="")
            elif isinstance(event, TargetStarted) and self.terminal.colours:
                self.terminal.say(f" [{event.number + 1}]", target_colour(event.number), end="")
            elif isinstance(event, Finished):
                self.last = event.answer
        self.terminal.say("")
        if chat.num_forgotten > forgotten:
            self.terminal.say(
                f"  (the conversation was too long: its first {chat.num_forgotten} turn(s) are forgotten)"
            )
        assert self.last is not None
        self._keep(choose_free_name(self.folder, self.image_path))

    def _keep(self, target: Path) -> None:
        answer = self._last_answer()
        write_answer(target, self.image, answer)
        self._list(answer, target)
        self.terminal.say(f"  overlay: {target}")

    def _list(self, answer: Answer, target: Path | None) -> None:
        if len(answer.masks):
            self.terminal.show(draw_overlay(self.image, answer.masks, answer.phrases))
        for number, line in enumerate(describe_targets(answer, target)):
            self.terminal.say(line, target_colour(number) if number < len(answer.masks) else None)

    def _say_lines(self, lines: list[str]) -> None:
        for line in lines:
            self.terminal.say(line)

    def _last_answer(self) -> Answer:
        if self.last is None:
            raise UserError("there is no answer yet: ask something first")
        return self.last

    def _masks(self, _: str) -> None:
        answer = self._last_answer()
        if not len(answer.masks):
            raise UserError("the last answer has no masks: ask for something in the image")
        self._list(answer, None)

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file: give a name such as answer.png")
        answer, target = self._last_answer(), Path(name)
        if target.suffix.lower() == ".html":
            write_text(target, answer_page(self.image, answer))
        else:
            check_image_name(target, "/save")
            write_answer(target, self.image, answer)
        self.terminal.say(f"  saved: {target}")

    def _undo(self, _: str) -> None:
        taken = self.chat.undo() if self.chat else None
        if taken is None:
            raise UserError("there is nothing to take back: no question was answered yet")
        self.last = self.chat.turns[-1][1] if self.chat and self.chat.turns else None
        self.terminal.say(f"  taken back: {taken[0]}")

    def _reset(self, _: str) -> None:
        if self.chat:
            self.chat.reset()
        self.last = None
        self.terminal.say("  forgotten")

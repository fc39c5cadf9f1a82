"""chat.py in a real pseudo-terminal: what keys do to it, what its windows show, and what it takes to kill it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.pseudo_terminal import CTRL_C, CTRL_D, PATIENCE, Screen
from tests.unit.tiny_pixellm import answer_ids, make_model, noise
from utils.checkpoints.builder import BuiltModel, save_model

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows"),
    pytest.mark.timeout(900),
]

ATTACK = "\x1b]0;owned\x07\x1b[2J\u202e"
# What may steer the terminal: colours, and what readline does to edit a line.
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?2004[hl]|\x1b\[[0-9]*[ACDKP]")


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    return make_model()


@pytest.fixture(scope="module")
def folder(built: BuiltModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat") / "model"
    save_model(built.model, built.processor, place)
    return place


Start = Callable[..., list[str]]


@pytest.fixture
def command(built: BuiltModel, folder: Path) -> Start:
    """The command that answers with the given texts in turn."""

    def made(answers: Sequence[str], *flags: object, pause: float = 0.0) -> list[str]:
        told = {"answers": [answer_ids(built.processor, answer) for answer in answers], "pause": pause}
        start = [sys.executable, "-m", "tests.unit.talking_chat", json.dumps(told)]
        return [*start, f"--version={folder}", *map(str, flags)]

    return made


@pytest.fixture
def typing_env(child_env: dict[str, str]) -> dict[str, str]:
    """A terminal with colours; its size is asked of the terminal alone."""
    own = {"TERM": "xterm", "COLORTERM": "truecolor", "INPUTRC": os.devnull, "LC_ALL": "C.UTF-8"}
    return {name: value for name, value in child_env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")} | own


def widest(written: str) -> int:
    """Columns of the image that was drawn in letters; 0 where none was."""
    return max(line.count("▀") for line in written.split("\n"))


def test_a_person_at_a_terminal(command: Start, typing_env: dict[str, str], tmp_path: Path, repository: Path) -> None:
    """Turns, Ctrl-C, windows, unicode and attacks in one sitting, because a process takes seconds to start."""
    image, vis = tmp_path / f"photo{ATTACK}.png", tmp_path / "vis"
    Image.fromarray(noise(30, 60)).save(image)
    answers = [
        "It is the red circle {seg}.",
        f"the {ATTACK} blue {{seg}} é日本 {ATTACK}.",
        "one two three " + "and so on " * 12,
        "It is small.",
        "the green star {seg}.",
    ]
    start = command(answers, f"--image={image}", f"--vis_save_path={vis}", pause=0.05)
    with Screen(start, typing_env, repository, columns=200, rows=50) as screen:
        screen.wait_for("Question: ")
        screen.enter("Where is the red circle?")
        screen.wait_for("Answer: It is the red circle")
        # 30 x 60 pixels, drawn at 390 x 780, into 72 columns.
        assert widest(screen.wait_for("overlay: ")) == 72
        screen.wait_for("Question: ")
        screen.resize(20, 30)
        screen.enter("And é日本?")
        said = screen.wait_for("overlay: ")
        assert widest(said) == 20 and "é日本" in said.split("Answer: ")[1]
        screen.wait_for("Question: ")
        screen.resize(12, 30)
        screen.enter("What else?")
        screen.wait_for("one two three")
        screen.press(CTRL_C)
        screen.wait_for("stopped")
        screen.wait_for("Question: ")
        screen.enter("How large?")
        assert widest(screen.wait_for("overlay: ")) == 0
        screen.wait_for("Question: ")
        screen.resize(80, 24)
        for taken in ("How large?", "And é日本?"):  # the stopped one was never a turn
            screen.enter("/undo")
            screen.wait_for(f"taken back: {taken}")
        screen.wait_for("Question: ")
        screen.press("Where is the blue" + "\x7f" * 4 + "star?")  # the erase key edits the line
        screen.enter("")
        screen.wait_for("the green star")
        screen.wait_for("Question: ")
        screen.press(CTRL_D)
        assert screen.end() == 0
    left = OURS.sub("", screen.written)
    assert not set(left) & {"\x1b", "\x07", "\u202e"}, left
    assert "Traceback" not in left
    assert len(list(vis.glob("*_?.png"))) == 4  # the stopped answer left no image


def hostile_lines(count: int, image: Path) -> list[str]:
    """Lines of words that hurt, bytes that are no text and keys that edit; none that ends, stops or clears input."""
    rng = random.Random(1)
    words = ["/image", "/save", "/masks", "/undo", "/reset", "/help", "/", "//", "~", "../..", "%s", "-1", " ", "--x"]
    words += ["\x1b[A", "\x1b[D", "\x7f", "\x01", "\x05", "\x0b", "\x19", "[SEG0]", "{seg}", "<image>", "</s>", "é"]
    words += ["日本", "\u202e", "\x9b2J", "\udcff", "\udcc3", "x" * 300, "\\", '"', "'", "$(ls)", str(image)]
    lines = [rng.choice(["", " "]).join(rng.choices(words, k=rng.randrange(6))) for _ in range(count)]
    return [line for line in lines if not re.search(r"/save\s*[^\s]", line)]


@pytest.mark.long
def test_five_hundred_hostile_lines_in_a_terminal(
    command: Start, typing_env: dict[str, str], tmp_path: Path, repository: Path
) -> None:
    image = tmp_path / "photo.png"
    Image.fromarray(noise(20, 30)).save(image)
    start = command(
        [f"{ATTACK} a {{seg}}", "é日本"],
        f"--image={image}",
        f"--vis_save_path={tmp_path / 'vis'}",
        "--max_new_tokens=9",
    )
    lines = hostile_lines(530, image)
    assert len(lines) >= 500
    with Screen(start, typing_env, tmp_path, columns=40, rows=10) as screen:
        screen.wait_for("Question: ")
        for number, line in enumerate(lines):
            screen.resize(12 + number % 90, 3 + number % 40)
            screen.enter(line)
            screen.enter(f"/after{number}")
            screen.wait_for(f"there is no command /after{number}:")
        screen.enter("/quit")
        assert screen.end() == 0, screen.written[-2000:]
    assert "Traceback" not in screen.written
    assert "\x1b]0" not in screen.written and "\x1b[2J" not in screen.written and "\x07owned" not in screen.written


def records(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a batch's results so far."""
    path = out / "results.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.long
def test_a_batch_killed_without_warning_goes_on(
    command: Start, typing_env: dict[str, str], child_env: dict[str, str], tmp_path: Path, repository: Path
) -> None:
    Image.fromarray(noise(20, 30)).save(tmp_path / "photo.png")
    lines = [json.dumps({"image": "photo.png", "question": f"Where is {number}?"}) for number in range(20)]
    lines.insert(3, "no json")
    (tmp_path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    asked = f"--batch={tmp_path / 'questions.jsonl'}"
    whole, out = tmp_path / "whole", tmp_path / "answers"
    # One answer for all, so that a run that begins in the middle gives what a whole one does.
    said = ["the red circle {seg}."]
    done = subprocess.run(command(said, asked, f"--out={whole}"), cwd=repository, env=child_env, timeout=PATIENCE)
    assert done.returncode == 1 and len(records(whole)) == 20
    with Screen(command(said, asked, f"--out={out}", pause=0.2), typing_env, repository) as screen:
        deadline = time.monotonic() + PATIENCE
        while not records(out):
            assert time.monotonic() < deadline and screen.program.poll() is None, screen.written[-2000:]
            time.sleep(0.05)  # between two looks; nothing depends on how long
        os.kill(screen.program.pid, signal.SIGKILL)
        assert screen.end() == -signal.SIGKILL
    half = records(out)
    assert 1 <= len(half) < 20
    with Screen(command(said, asked, f"--out={out}"), typing_env, repository) as screen:
        screen.wait_for(f"{len(half)} of 20 questions were answered before")
        screen.wait_for("line 4: is no JSON")
        assert screen.end() == 1
    assert records(out) == records(whole)
    for one in records(whole):
        kept, other = (np.asarray(Image.open(place / one["overlay"])) for place in (whole, out))
        assert np.array_equal(kept, other)

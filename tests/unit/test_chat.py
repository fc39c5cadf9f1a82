"""chat.py: one answer, a conversation, and everything that a person may type wrongly."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import chat
from model.build.builder import BuiltModel
from model.predictor import Predictor
from tests.unit.tiny_pixellm import make_model, noise, saying
from utils import scripts
from utils.scripts import run_script

SAID = "It is the red circle {seg} and the blue square {seg}."


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    return make_model()


@pytest.fixture(autouse=True)
def loaded(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Every folder is the tiny model, which says SAID; gives what it was asked to load."""
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Predictor:
        asked.append(arguments)
        return Predictor(built.model, built.processor)

    monkeypatch.setattr(chat.Predictor, "from_pretrained", load)
    monkeypatch.setattr(scripts, "_said", set())
    with saying(built, [SAID]):
        yield asked


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(noise(20, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Types the given lines, then ends the input; an exception among them is raised instead."""

    def types(*lines: str | BaseException) -> None:
        waiting = list(lines)

        def read(invitation: str = "") -> str:
            print(invitation, end="")
            line = waiting.pop(0) if waiting else EOFError()
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return types


def run(*flags: object) -> int:
    try:
        return run_script(chat.main, ["--version=model", *map(str, flags)])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_one_answer_writes_overlay_and_masks_and_prints_everything(
    built: BuiltModel, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "answer.png"
    assert run(f"--image={picture}", "--prompt=Where are they?", f"--out={out}") == 0
    predictor = Predictor(built.model, built.processor)
    predictor.set_image(picture)
    answer = predictor.ask("Where are they?")
    assert Image.open(out).size == (390, 260)
    assert sorted(path.name for path in out.parent.iterdir()) == ["answer.png", "answer_mask1.png", "answer_mask2.png"]
    for number, mask in enumerate(answer.masks, start=1):
        written = np.asarray(Image.open(out.with_name(f"answer_mask{number}.png")))
        assert np.array_equal(written, np.where(mask, 255, 0))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Answer: It is the red circle and the blue square."
    area, score = answer.areas[0], answer.scores[0]
    assert said[1] == (
        f"  1. the red circle: box {list(answer.boxes[0])}, area {area} px ({area / 6:.1f}%), score {score:.3f}, "
        f"mask {out.with_name('answer_mask1.png')}"
    )
    assert "2. the blue square" in said[2]


def test_without_out_answers_gather_in_a_folder(picture: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(f"--image={picture}", "--prompt=Where?", f"--vis_save_path={tmp_path / 'vis'}") == 0
    names = {path.name for path in (tmp_path / "vis").iterdir()}
    assert names >= {"photo_1.png", "photo_1_mask1.png", "photo_2.png", "photo_2_mask2.png"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt=Where?"], "--prompt is given without --image"),
        (["--image={picture}", "--out={place}/a.png"], "--out is for one answer"),
        (["--image={picture}", "--prompt=Where?", "--out={place}/a.txt"], "is no picture file"),
        (["--image={picture}", "--prompt=Where?", "--out={picture}/a.png"], "cannot write"),
        (["--image={place}/gone.png", "--prompt=Where?"], "does not exist"),
        (["--image={place}/broken.png", "--prompt=Where?"], "cannot be read"),
        (["--image={place}", "--prompt=Where?"], "cannot be read"),
        (["--image={picture}", "--prompt="], "the prompt is empty"),
        (["--image={picture}", "--prompt=  "], "the prompt is empty"),
        (["--image={picture}", "--prompt=the [SEG0]"], "reserved token"),
        (["--image={picture}", "--prompt=<image> what"], "reserved token"),
        (["--image={picture}", "--prompt=where is {{seg}}"], "reserved token"),
        (["--image={picture}", "--prompt=Where?", "--precision=int8"], "--precision must be one of"),
        (["--image={picture}", "--prompt=" + "word " * 300], "model_max_length"),
    ],
)
def test_one_answer_refuses_in_one_sentence(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    before = sorted(tmp_path.iterdir())
    where = f"--vis_save_path={tmp_path / 'vis'}" if not any("--out" in flag for flag in flags) else "--device=auto"
    assert run(where, *(flag.format(picture=picture, place=tmp_path) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_conversation_goes_on_after_every_mistake(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture, keyboard: Callable[..., None]
) -> None:
    Image.fromarray(noise(5, 5)).save(tmp_path / "other.png")
    keyboard(
        str(tmp_path / "gone.png"),  # no picture yet: asked for again
        "",
        str(picture),
        "Where?",
        "",
        "the [SEG3] please",
        "/image nowhere.png",
        "Where again?",
        f"/image {tmp_path / 'other.png'}",
        "  And there?  ",
    )
    assert run(f"--vis_save_path={tmp_path / 'vis'}") == 0
    said = capsys.readouterr().out
    assert said.count("Answer: It is the red circle") == 3
    assert said.count("does not exist") + said.count("cannot be read") == 3
    for words in ("the prompt is empty", "reserved token(s) [SEG3]"):
        assert words in said
    overlays = sorted(path.name for path in (tmp_path / "vis").glob("*_?.png"))
    assert overlays == ["other_1.png", "photo_1.png", "photo_2.png"]


@pytest.mark.parametrize("leave", ["/quit", EOFError()])
def test_a_conversation_can_be_left(picture: Path, keyboard: Callable[..., None], leave: Any) -> None:
    keyboard(leave, "never read")
    assert run(f"--image={picture}") == 0


def test_ctrl_c_stops_an_answer_and_leaves_at_the_question(
    built: BuiltModel,
    picture: Path,
    keyboard: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(built.model, "generate_answers", interrupt)
    keyboard("Where?", "Where?", KeyboardInterrupt())
    assert run(f"--image={picture}", f"--vis_save_path={tmp_path / 'vis'}") == 130
    assert capsys.readouterr().out.count("stopped") == 2
    assert not (tmp_path / "vis").exists()


def test_a_bad_first_picture_ends_a_conversation_before_it_starts(tmp_path: Path, keyboard: Any) -> None:
    keyboard("never read")
    assert run(f"--image={tmp_path / 'gone.png'}") == 2


def test_control_characters_do_not_reach_the_terminal(
    built: BuiltModel, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with saying(built, ["It is the \x1b[31mred\x07 thing {seg}."]):
        assert run(f"--image={picture}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}") == 0
    said = capsys.readouterr().out
    assert "[31mred" in said
    assert not set(said) & {"\x1b", "\x07"}


def test_an_answer_without_masks(
    built: BuiltModel, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with saying(built, ["There is none."]):
        assert run(f"--image={picture}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}") == 0
    assert capsys.readouterr().out.splitlines() == ["Answer: There is none.", f"  overlay: {tmp_path / 'a.png'}"]
    assert not list(tmp_path.glob("a_mask*"))


def test_the_folder_says_the_precision_unless_a_flag_does(
    loaded: list[tuple[Any, ...]], picture: Path, tmp_path: Path
) -> None:
    asked = (f"--image={picture}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}")
    assert run(*asked) == 0
    assert run(*asked, "--precision=fp32", "--device=cpu", "--attn_implementation=eager") == 0
    assert loaded == [("model", "auto", None, "sdpa"), ("model", "cpu", torch.float32, "eager")]


def test_flags_without_effect_are_named(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = (f"--image={picture}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}")
    assert run(*asked, "--seg_token_num=3", "--vision-tower=openai/clip", "--load_in_8bit", "--image_size=1024") == 0
    said = capsys.readouterr().err
    for flag in ("--seg_token_num", "--vision_tower", "--load_in_8bit", "--image_size"):
        assert flag in said
    assert "no effect" in said

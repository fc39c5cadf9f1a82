"""chat.py: one answer, a conversation, and everything that a person may type wrongly."""

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import chat
from model.predictor import Predictor
from model.processing_pixellm import PixelLMProcessor
from tests.unit.tiny_pixellm import make_model, noise, saying
from utils.checkpoints.builder import BuiltModel
from utils.cli.errors import run_script
from utils.serving.terminal import Terminal

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

    monkeypatch.setattr(Predictor, "from_pretrained", load)
    with saying(built, [SAID]):
        yield asked


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(noise(20, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A person who types the given lines, then ends the input; an exception among them is raised instead."""

    class Person(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Person())

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
    built: BuiltModel, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "answer.png"
    assert run(f"--image={image}", "--prompt=Where are they?", f"--out={out}") == 0
    predictor = Predictor(built.model, built.processor)
    predictor.set_image(image)
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


def test_without_out_answers_gather_in_a_folder(image: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(f"--image={image}", "--prompt=Where?", f"--vis_save_path={tmp_path / 'vis'}") == 0
    names = {path.name for path in (tmp_path / "vis").iterdir()}
    assert names >= {"photo_1.png", "photo_1_mask1.png", "photo_2.png", "photo_2_mask2.png"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt=Where?"], "--prompt is given without --image"),
        (["--image={image}", "--out={place}/a.png"], "--out is for one answer"),
        (["--image={image}", "--prompt=Where?", "--out={place}/a.txt"], "is no image file"),
        (["--image={image}", "--prompt=Where?", "--out={image}/a.png"], "cannot write"),
        (["--image={place}/gone.png", "--prompt=Where?"], "does not exist"),
        (["--image={place}/broken.png", "--prompt=Where?"], "cannot be read"),
        (["--image={place}", "--prompt=Where?"], "cannot be read"),
        (["--image={image}", "--prompt="], "the prompt is empty"),
        (["--image={image}", "--prompt=  "], "the prompt is empty"),
        (["--image={image}", "--prompt=the [SEG0]"], "reserved token"),
        (["--image={image}", "--prompt=<image> what"], "reserved token"),
        (["--image={image}", "--prompt=where is {{seg}}"], "reserved token"),
        (["--image={image}", "--prompt=Where?", "--precision=int8"], "--precision must be one of"),
        (["--image={image}", "--prompt=Where?", "--load_in_8bit", "--load_in_4bit"], "contradict each other"),
        (["--image={image}", "--prompt=" + "word " * 300], "model_max_length"),
    ],
)
def test_one_answer_refuses_in_one_sentence(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    before = sorted(tmp_path.iterdir())
    where = f"--vis_save_path={tmp_path / 'vis'}" if not any("--out" in flag for flag in flags) else "--device=auto"
    assert run(where, *(flag.format(image=image, place=tmp_path) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_conversation_goes_on_after_every_mistake(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture, keyboard: Callable[..., None]
) -> None:
    Image.fromarray(noise(5, 5)).save(tmp_path / "other.png")
    keyboard(
        str(tmp_path / "gone.png"),  # no image yet: asked for again
        "",
        str(image),
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
def test_a_conversation_can_be_left(image: Path, keyboard: Callable[..., None], leave: Any) -> None:
    keyboard(leave, "never read")
    assert run(f"--image={image}") == 0


def test_ctrl_c_stops_an_answer_and_leaves_at_the_question(
    built: BuiltModel,
    image: Path,
    keyboard: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(built.model, "encode_images", interrupt)
    keyboard("Where?", "Where?", KeyboardInterrupt())
    assert run(f"--image={image}", f"--vis_save_path={tmp_path / 'vis'}") == 130
    assert capsys.readouterr().out.count("stopped") == 2
    assert not (tmp_path / "vis").exists()


def test_a_bad_first_image_ends_a_conversation_before_it_starts(tmp_path: Path, keyboard: Any) -> None:
    keyboard("never read")
    assert run(f"--image={tmp_path / 'gone.png'}") == 2


def test_control_characters_do_not_reach_the_terminal(
    built: BuiltModel, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with saying(built, ["It is the \x1b[31mred\x07 thing {seg}."]):
        assert run(f"--image={image}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}") == 0
    said = capsys.readouterr().out
    assert "[31mred" in said
    assert not set(said) & {"\x1b", "\x07"}


def test_an_answer_without_masks(built: BuiltModel, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with saying(built, ["There is none."]):
        assert run(f"--image={image}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}") == 0
    assert capsys.readouterr().out.splitlines() == ["Answer: There is none.", f"  overlay: {tmp_path / 'a.png'}"]
    assert not list(tmp_path.glob("a_mask*"))


def test_the_folder_says_the_precision_unless_a_flag_does(
    loaded: list[tuple[Any, ...]], image: Path, tmp_path: Path
) -> None:
    asked = (f"--image={image}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}")
    assert run(*asked) == 0
    assert run(*asked, "--precision=fp32", "--device=cpu", "--attn_implementation=eager") == 0
    assert run(*asked, "--load_in_4bit") == 0
    assert loaded == [
        ("model", "auto", None, "sdpa", None),
        ("model", "cpu", torch.float32, "eager", None),
        ("model", "auto", None, "sdpa", 4),
    ]


def test_flags_without_effect_are_named(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = (f"--image={image}", "--prompt=Where?", f"--out={tmp_path / 'a.png'}")
    assert run(*asked, "--seg_token_num=3", "--vision-tower=openai/clip", "--image_size=1024") == 0
    said = capsys.readouterr().err
    for flag in ("--seg_token_num", "--vision_tower", "--image_size"):
        assert flag in said
    assert "no effect" in said


def test_commands_of_a_conversation(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture, keyboard: Callable[..., None]
) -> None:
    saved = tmp_path / "kept" / "answer.png"
    keyboard(
        "/masks",  # there is no image yet, so no answer
        f"/image {image}",
        "/undo",
        "Where?",
        "/masks",
        f"/save {saved}",
        "/save",
        f"/save {saved.with_suffix('.html')}",
        f"/save {image}/answer.html",
        f"/save {tmp_path / 'answer.txt'}",
        f"/save {image}/answer.png",
        "/save a\0b.png",
        "/undo",
        "/masks",
        "Where?",
        "/reset",
        "/undo",
        "/nonsense",
        "/help",
    )
    assert run(f"--vis_save_path={tmp_path / 'vis'}") == 0
    said = capsys.readouterr().out
    assert said.count("there is no answer yet") == 2
    assert said.count("there is nothing to take back") == 2
    assert said.count("2. the blue square: box") == 3  # two answers and /masks
    names = sorted(path.name for path in saved.parent.iterdir())
    assert names == ["answer.html", "answer.png", "answer_mask1.png", "answer_mask2.png"]
    assert "/save needs a file" in said and "answer.txt is no image file" in said and "taken back: Where?" in said
    assert said.count("cannot write") == 3 and "there is no command /nonsense" in said and "/image FILE" in said


def test_a_conversation_is_asked_with_its_turns(
    built: BuiltModel, image: Path, keyboard: Callable[..., None], tmp_path: Path, monkeypatch: Any
) -> None:
    prompts: list[Any] = []
    encode = PixelLMProcessor.encode_question
    monkeypatch.setattr(
        PixelLMProcessor, "encode_question", lambda self, turns: prompts.append(turns) or encode(self, turns)
    )
    keyboard("Where?", "And there?", "/undo", "Again?", "/reset", "Last?", f"/image {image}", "New?")
    assert run(f"--image={image}", f"--vis_save_path={tmp_path / 'vis'}") == 0
    asked = [[question for question, _ in turns] for turns in prompts]
    assert asked == [["Where?"], ["Where?", "And there?"], ["Where?", "Again?"], ["Last?"], ["New?"]]
    assert prompts[1][0] == ("Where?", SAID)


def test_a_pipe_gets_answers_alone_and_a_status(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"--vis_save_path={tmp_path / 'vis'}"
    monkeypatch.setattr("sys.stdin", io.StringIO("Where?\nWhere again?\n"))
    assert run(f"--image={image}", where) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Answer: It is the red circle and the blue square."
    assert len(said) == 8 and not [line for line in said if "Question" in line or "/help" in line]
    monkeypatch.setattr("sys.stdin", io.StringIO("Where?\x1b[2J\n/undo\n"))
    assert run(f"--image={image}", where, "--echo") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "Question: Where? [2J" and shown[1].startswith("Answer: ") and shown[5] == "Question: /undo"
    monkeypatch.setattr("sys.stdin", io.StringIO("the [SEG0]\nWhere?\n"))
    assert run(f"--image={image}", where) == 1
    said = capsys.readouterr().out.splitlines()
    assert "reserved token" in said[0] and said[1].startswith("Answer: ")


def test_nothing_typed_or_named_can_steer_the_terminal(
    built: BuiltModel, tmp_path: Path, capsys: pytest.CaptureFixture, keyboard: Callable[..., None]
) -> None:
    hostile = tmp_path / "a\x1b]0;title\x07\u202eb.png"
    Image.fromarray(noise(20, 30)).save(hostile)
    keyboard(
        f"/image {hostile}", "Where?\x1b[2J", "/nonsense\x1b[2J", "/undo", "/image \x1b[31mgone", "/save \x1b[3m.txt"
    )
    with saying(built, ["the \x1b[31mred\x07 \u202ething {seg}."]):
        assert run(f"--vis_save_path={tmp_path / 'vis'}") == 0
    said = capsys.readouterr()
    assert not set(said.out + said.err) & {"\x1b", "\x07", "\u202e"} and "overlay" in said.out


class Colourful(io.StringIO):
    """A terminal with colours."""

    def isatty(self) -> bool:
        return True


def test_colours_and_a_image_where_the_terminal_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for columns in (8, 20, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "40")
        for able in ({"COLORTERM": "truecolor"}, {"COLORTERM": "truecolor", "NO_COLOR": ""}, {}):
            out = Colourful()
            terminal = Terminal(out, Colourful(), able)
            terminal.say("red \x1b[0m", (255, 0, 0))
            terminal.show(noise(30, 60))
            drawn[columns, len(able)] = out.getvalue()
    assert drawn[20, 2] == drawn[20, 0] == "red  [0m\n"
    assert drawn[8, 1] == "\x1b[38;2;255;0;0mred  [0m\x1b[0m\n"  # no room for an image
    # 20 columns wide, so 10 pixels high, which are 5 rows of letters; 200 are cut to 72 columns, 36 pixels, 18 rows.
    assert drawn[20, 1].count("\n") == 1 + 5 and drawn[20, 1].count("▀") == 5 * 20
    assert drawn[200, 1].count("\n") == 1 + 18 and drawn[200, 1].count("▀") == 18 * 72


def test_five_hundred_hostile_lines(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture, keyboard: Callable[..., None], built: BuiltModel
) -> None:
    rng = random.Random(0)
    words = ["/image", "/save", "/masks", "/undo", "/reset", "/help", "/", "//", "~", "../..", "%s", "-1", " ", "\r"]
    words += ["\0", "\x1b[2J", "[SEG0]", "{seg}", "<image>", "</s>", "é", "日本", "\u202e", "\ud800", "x" * 5000]
    words += [str(image)]
    lines = [rng.choice(["", " "]).join(rng.choices(words, k=rng.randrange(6))) for _ in range(500)]
    keyboard(*[line for line in lines if not line.startswith(("/save ", "/save/"))])
    with saying(built, ["a {seg}"]):
        assert run(f"--image={image}", f"--vis_save_path={tmp_path / 'vis'}", "--max_new_tokens=2") == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err and not set(said.out) & {"\x1b", "\0", "\u202e"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch={place}/q.jsonl"], "without --out"),
        (["--batch={place}/q.jsonl", "--out={place}/o", "--prompt=x"], "leave --image and --prompt out"),
        (["--batch={place}/gone.jsonl", "--out={place}/o"], "cannot read the questions"),
        (["--batch={place}/empty.jsonl", "--out={place}/o"], "holds no question"),
        (["--batch={place}/q.jsonl", "--out={place}/q.jsonl"], "cannot write to"),
    ],
)
def test_a_batch_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], said: str
) -> None:
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "?"}')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert run(*(flag.format(place=tmp_path) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve questions about three images, and five bad lines between them."""
    for number in range(3):
        Image.fromarray(noise(20 + number, 30, seed=number)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": f"{number % 3}.png", "question": f"Where is {number}?"}) for number in range(12)]
    lines[2:2] = ["no json", '{"image": "0.png"}', '{"image": "gone.png", "question": "?"}', "[1]", ""]
    lines.append('{"image": "0.png", "question": "the [SEG0]"}')
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    return tmp_path / "questions.jsonl"


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def batch(questions: Path, out: Path, built: BuiltModel, *flags: str) -> int:
    with saying(built, [SAID] * 8):
        return run(f"--batch={questions}", f"--out={out}", *flags)


def test_a_batch_answers_in_order_and_reports_bad_lines(
    questions: Path, tmp_path: Path, built: BuiltModel, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "answers"
    assert batch(questions, out, built) == 1
    found = records(out)
    assert [one["line"] for one in found] == [1, 2, *range(8, 18)]
    assert [one["question"] for one in found] == [f"Where is {number}?" for number in range(12)]
    predictor = Predictor(built.model, built.processor)
    for one in found:
        answer = predictor.session(questions.parent / one["image"])
        with saying(built, [SAID]):
            expected = answer.ask(one["question"]).to_dict()
        assert {name: one[name] for name in ("text", "marked_text", "num_broken")} == {
            name: expected[name] for name in ("text", "marked_text", "num_broken")
        }
        assert [target["phrase"] for target in one["targets"]] == ["the red circle", "the blue square"]
        for target, other in zip(one["targets"], expected["targets"], strict=True):
            assert target["segmentation"]["size"] == other["segmentation"]["size"]
        assert (out / one["overlay"]).is_file()
    told = capsys.readouterr().err
    for line, why in [(3, "is no JSON"), (4, "needs a text"), (5, "does not exist"), (6, "needs"), (18, "reserved")]:
        (said,) = [one for one in told.splitlines() if f"line {line}: " in one]
        assert why in said


def test_a_batch_killed_goes_on_where_it_was(
    questions: Path, tmp_path: Path, built: BuiltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "answers"
    assert batch(questions, whole, built) == 1
    asked: list[int] = []
    answer = Predictor.answer

    def dies(self: Predictor, images: Any, questions: Any, *others: Any) -> Any:
        asked.append(len(questions))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, images, questions, *others)

    monkeypatch.setattr(Predictor, "answer", dies)
    assert batch(questions, out, built) == 130
    assert len(records(out)) == asked[0]
    with (out / "results.jsonl").open("a") as file:
        file.write('{"line": 99, "cut o')  # what a kill may leave
    assert batch(questions, out, built) == 1
    assert records(out) == records(whole)
    assert batch(questions, out, built) == 1
    assert sum(asked) == asked[0] + asked[1] + 12 - asked[0], "what was answered is not asked again"
    # Other settings are another answer; one question more is asked alone and comes last.
    assert batch(questions, out, built, "--max_new_tokens=300") == 1
    assert sum(asked) == asked[0] + asked[1] + 12 - asked[0] + 12
    assert {one["settings"]["max_new_tokens"] for one in records(out)} == {300}

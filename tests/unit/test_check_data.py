"""check_data.py over made-up data with one fault each: it is named in the table and in the JSON, and counted."""

import builtins
import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import check_data
from tests.unit import data_sets
from tests.unit.data_sets import HEIGHT, WIDTH, annotation, corners, muse_instance, ref, shape, square
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import save_model
from utils.cli.errors import run_script
from utils.data.check.examine import Examination
from utils.data.check.leaks import image_key
from utils.data.check.report import BROKEN, HARMLESS, LEFT_OUT, MISSING
from utils.data.errors import DataError
from utils.data.readers.base import ReaderOptions
from utils.data.readers.registry import build_reader

INSTANCES = "refer_seg/refcoco/instances.json"
REFS = "refer_seg/refcoco/refs(unc).p"
IMAGE = f"{data_sets.COCO}/train2014/COCO_1.jpg"
REFCOCO = ["--dataset=refer_seg", "--refer_seg_data=refcoco"]
MUSE = ["--dataset=multi_reason_seg"]
PASCAL = ["--dataset=sem_seg", "--sem_seg_data=pascal_part"]
ADE20K = ["--dataset=sem_seg", "--sem_seg_data=ade20k"]
MAPILLARY = ["--dataset=sem_seg", "--sem_seg_data=mapillary"]
REASON = ["--dataset=reason_seg", "--reason_seg_data=ReasonSeg|train"]


def run(root: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON."""
    report = root.parent / f"{root.name}.json"
    status = run_script(check_data.main, [f"--dataset_dir={root}", "--val_dataset=", f"--json={report}", *flags])
    return status, json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}


def found_by(result: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """(level, count) of every cause."""
    return {one["cause"]: (one["level"], one["count"]) for part in result["sets"] for one in part["findings"]}


def sound(root: Path) -> Path:
    """A referring set without a fault."""
    refs = [ref(1, 1, 11, "the left cup"), ref(2, 2, 21, "the big cup"), ref(3, 3, 32, "small", split="val")]
    return data_sets.write_refer_seg(root, found=refs)


def rewritten(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    data_sets.write_json(path, content)


def instances(root: Path, change: Callable[[Any], None]) -> None:
    rewritten(sound(root) / INSTANCES, change)


def segmentation(value: Any) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        instances(root, lambda content: content["annotations"][0].update(segmentation=value))

    return plant


def muse(**changes: Any) -> Callable[[Path], None]:
    cup = muse_instance("cup", [square(2, 2, 4)])
    sizes = {"id": 1, "file_name": "COCO_1.jpg", "height": HEIGHT, "width": WIDTH}
    first = {**sizes, "questions": ["What?"], "answers": [[cup]], "text_answers": ["It is the cup {seg}."]}

    def plant(root: Path) -> None:
        data_sets.write_muse(root, [first, {**first, **changes}])

    return plant


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def text_as_image(root: Path) -> None:
    (sound(root) / IMAGE).write_text("I am no image", encoding="utf-8")


def link_out(root: Path) -> None:
    sound(root)
    data_sets.write_image(root.parent / "outside" / "COCO_1.jpg")
    (root / IMAGE).unlink()
    (root / IMAGE).symlink_to(root.parent / "outside" / "COCO_1.jpg")


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never be said",)


def other_size(root: Path) -> None:
    data_sets.write_image(sound(root) / IMAGE, HEIGHT + 8, WIDTH)


def with_mark(root: Path) -> None:
    path = sound(root) / INSTANCES
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def latin(root: Path) -> None:
    path = sound(root) / INSTANCES
    path.write_bytes(path.read_bytes().replace(b'"cup"', '"café"'.encode("cp1252")))


def annotation_twice(content: Any) -> None:
    content["annotations"].append(annotation(11, 1, [square(9, 9, 3)]))


# name: what is planted, the flags that ask for it, the cause it must be found by, its level, and the exit status.
Fault = tuple[Callable[[Path], Any], list[str], str, str, int]
FAULTS: dict[str, Fault] = {
    "missing image": (lambda r: (sound(r) / IMAGE).unlink(), REFCOCO, "missing image", BROKEN, 1),
    "truncated JPEG": (lambda r: cut(sound(r) / IMAGE), REFCOCO, "damaged image", BROKEN, 1),
    "truncated JSON": (lambda r: cut(sound(r) / INSTANCES), REFCOCO, "broken JSON", BROKEN, 1),
    "BOM": (with_mark, REFCOCO, "byte order mark", HARMLESS, 0),
    "cp1252 in a COCO file": (latin, REFCOCO, "text in another encoding", BROKEN, 1),
    "cp1252 in ReasonSeg": (
        lambda r: data_sets.write_reason_seg(r, encoding="cp1252"),
        REASON,
        "text in cp1252 or another encoding than UTF-8",
        HARMLESS,
        0,
    ),
    "wrong split": (
        sound,
        ["--dataset=reason_seg", "--reason_seg_data=ReasonSeg|explanatory"],
        "split that does not exist",
        BROKEN,
        1,
    ),
    "wrong split of refs": (
        lambda r: data_sets.write_refer_seg(r, found=[ref(1, 1, 11, "cup", split="test")]),
        REFCOCO,
        "split that does not exist",
        BROKEN,
        1,
    ),
    "refs without annotation": (
        data_sets.write_refer_seg,
        REFCOCO,
        "ref to an annotation instances.json does not hold",
        LEFT_OUT,
        0,
    ),
    "annotation of an absent image": (
        data_sets.write_parts,
        PASCAL,
        "annotation of an image that is not listed",
        LEFT_OUT,
        0,
    ),
    "zero-area polygon": (
        segmentation([[1, 1, 5, 5, 9, 9]]),
        REFCOCO,
        "ref to an annotation without a polygon that has an inside",
        LEFT_OUT,
        0,
    ),
    "polygon of two points": (
        segmentation([[1, 1, 5, 5]]),
        REFCOCO,
        "ref to an annotation without a polygon that has an inside",
        LEFT_OUT,
        0,
    ),
    "RLE of the wrong size": (
        segmentation({"size": [HEIGHT + 1, WIDTH], "counts": [0, (HEIGHT + 1) * WIDTH]}),
        REFCOCO,
        "run lengths of another size",
        BROKEN,
        1,
    ),
    "mask of another size": (other_size, REFCOCO, "mask of another size than its image", BROKEN, 1),
    "label over range": (
        lambda r: data_sets.write_ade20k(r, np.full((HEIGHT, WIDTH), 200, dtype=np.uint8)),
        ADE20K,
        "label map of another edition",
        BROKEN,
        1,
    ),
    "empty class list": (
        lambda r: rewritten(data_sets.write_mapillary(r) / "mapillary/config_v2.0.json", lambda c: c["labels"].clear()),
        MAPILLARY,
        "empty class list",
        BROKEN,
        1,
    ),
    "empty list of categories": (
        lambda r: instances(r, lambda c: c["categories"].clear()),
        REFCOCO,
        "empty class list",
        BROKEN,
        1,
    ),
    "no questions": (muse(questions=[]), MUSE, "record without questions", LEFT_OUT, 0),
    "more {seg} than masks": (
        muse(text_answers=["Here {seg} and {seg}."]),
        MUSE,
        "answer with more {seg} than masks",
        LEFT_OUT,
        0,
    ),
    "fewer {seg} than masks": (muse(text_answers=["Here."]), MUSE, "answer with fewer {seg} than masks", LEFT_OUT, 0),
    "NaN coordinate": (
        segmentation([[2, 2, float("nan"), 2, 8, 8]]),
        REFCOCO,
        "coordinate that is not finite",
        BROKEN,
        1,
    ),
    "negative box": (
        lambda r: instances(r, lambda c: c["annotations"][0].update(bbox=[1, 1, -5, 4])),
        REFCOCO,
        "box of negative size (masks are read, boxes are not)",
        HARMLESS,
        0,
    ),
    "duplicate id of an annotation": (
        lambda r: instances(r, annotation_twice),
        REFCOCO,
        "annotation id listed twice for different annotations",
        LEFT_OUT,
        0,
    ),
    "duplicate id of an image": (
        lambda r: instances(r, lambda c: c["images"].append({**c["images"][0], "file_name": "other.jpg"})),
        REFCOCO,
        "image id listed twice for different images",
        LEFT_OUT,
        0,
    ),
    "an image that is text": (text_as_image, REFCOCO, "file that is no image", BROKEN, 1),
    "a link out of the root": (link_out, REFCOCO, "path out of the data root", BROKEN, 1),
    "a pickle with code": (
        lambda r: (sound(r) / REFS).write_bytes(pickle.dumps([RunsCode()], protocol=2)),
        REFCOCO,
        "pickle with code",
        BROKEN,
        1,
    ),
    "target outside the image": (
        segmentation([square(WIDTH + 5, 2, 6)]),
        REFCOCO,
        "target without a pixel",
        BROKEN,
        1,
    ),
    "target half outside": (
        segmentation([square(WIDTH - 5, 2, 15)]),
        REFCOCO,
        "target that reaches out of its image",
        HARMLESS,
        0,
    ),
    "shape of ReasonSeg without an inside": (
        lambda r: data_sets.write_reason_seg(
            r,
            record={
                "text": ["What?"],
                "is_sentence": True,
                "shapes": [shape("target", *corners(2, 2, 5)), shape("target", (1, 1), (2, 2))],
            },
        ),
        REASON,
        "polygon of fewer than three points",
        LEFT_OUT,
        0,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plant, flags, cause, level, expected = FAULTS[name]
    root = tmp_path / "data"
    plant(root)
    status, result = run(root, *flags)
    said = capsys.readouterr().out
    assert found_by(result)[cause][0] == level and cause in said, (found_by(result), said)
    assert status == expected
    assert "\x1b" not in said and "this must never be said" not in said


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault[3] == BROKEN])
def test_training_refuses_or_replaces_what_is_broken(name: str, tmp_path: Path) -> None:
    """As dataset/README.md says: a broken annotation file stops the run, a broken sample is replaced and counted."""
    plant, flags, cause, _, _ = FAULTS[name]
    plant(tmp_path / "data")
    flag = {"multi_reason_seg": "MultiReasonSeg"}.get(flags[0].partition("=")[2], flags[-1].partition("=")[2])
    data_set, _, split = flag.partition("|")
    try:
        reader = build_reader(data_set, tmp_path / "data", split or "train", ReaderOptions(explanatory=-1))
    except DataError as error:
        assert error.cause == cause
        return
    examination = Examination(reader, range(len(reader)), with_content=False)
    found = [one for place in range(len(reader)) for _, one, _ in examination[place].findings]
    assert found == [cause]


def test_a_missing_root_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, result = run(tmp_path / "nowhere", *REFCOCO)
    assert status == 1 and found_by(result) == {"missing data root": (MISSING, 1)}
    assert "there is no data root" in capsys.readouterr().out


def test_missing_parts_come_with_their_archive(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    status, result = run(tmp_path / "data", "--dataset=refer_seg||vqa", "--refer_seg_data=refcoco||refcoco+")
    said = capsys.readouterr().out
    assert status == 1 and [part["state"] for part in result["sets"]] == ["missing"] * 3
    assert "refcoco+.zip of lichengunc/refer" in said and "train2014.zip of COCO" in said
    assert len(result["sets"][0]["missing"]) == 3 and result["sets"][0]["findings"] == []


@pytest.mark.parametrize("name", ["COCO_2.jpg", "refs(unc).p"])
def test_an_unreadable_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound(tmp_path / "data")
    opened = builtins.open

    def failing(path: Any, *rest: Any, **more: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *rest, **more)

    monkeypatch.setattr(builtins, "open", failing)
    status, result = run(tmp_path / "data", *REFCOCO)
    assert status == 1 and found_by(result)["unreadable file"] == (BROKEN, 1)


def test_what_is_sound_is_usable(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sound(tmp_path / "data")
    status, result = run(tmp_path / "data", *REFCOCO)
    (part,) = result["sets"]
    assert status == 0 and part["state"] == "usable" and part["findings"] == []
    assert (part["images"], part["opened"], part["questions"], part["targets"]) == (2, 2, 2, 2)
    assert "usable" in capsys.readouterr().out


def test_full_opens_everything_in_parallel(tmp_path: Path) -> None:
    root = tmp_path / "data"
    refs = [ref(n, n, n, "cup") for n in range(1, 41)]
    content = {
        "images": [{"id": n, "file_name": f"COCO_{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in range(1, 41)],
        "categories": [{"id": 7, "name": "cup"}],
        "annotations": [annotation(n, n, [square(2, 2, 6)]) for n in range(1, 41)],
    }
    data_sets.write_refer_seg(root, found=refs)
    data_sets.write_json(root / INSTANCES, content)
    for n in range(1, 41):
        data_sets.write_image(root / data_sets.COCO / "train2014" / f"COCO_{n}.jpg")
    cut(root / data_sets.COCO / "train2014" / "COCO_40.jpg")
    status, result = run(root, *REFCOCO)
    assert status == 0 and result["sets"][0]["opened"] == 32
    for workers in ("0", "2"):
        status, result = run(root, *REFCOCO, "--full", f"--workers={workers}")
        assert status == 1 and result["sets"][0]["opened"] == 40
        assert found_by(result) == {"damaged image": (BROKEN, 1)}


def test_leaks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "data"
    refs = [ref(1, 1, 11, "cup"), ref(2, 2, 21, "cup"), ref(3, 1, 12, "light", split="testA")]
    data_sets.write_refer_seg(root, found=refs)
    data_sets.write_vqa(root)
    status, result = run(root, *["--dataset=refer_seg||vqa", "--refer_seg_data=refcoco"])
    assert status == 0
    leaks = {(leak["training"], leak["evaluation"]): leak["count"] for leak in result["leaks"]}
    assert leaks[("refcoco (train)", "refcoco (testA)")] == 1
    assert leaks[("llava_instruct_150k (train)", "refcoco (testA)")] == 1
    assert "--exclude_val" in capsys.readouterr().out
    _, result = run(root, *REFCOCO, "--exclude_val")
    assert result["leaks"] == []


def test_leaks_by_content_are_found_with_full(tmp_path: Path) -> None:
    root = data_sets.write_reason_seg(data_sets.write_reason_seg(tmp_path / "data"), "val")
    flags = [*REASON, "--val_dataset=ReasonSeg|val"]
    assert run(root, *flags)[1]["leaks"] == []
    (leak,) = run(root, *flags, "--full", "--workers=0")[1]["leaks"]
    assert (leak["by"], leak["count"]) == ("content", 1) and leak["first"].endswith("train_a.jpg")


def test_a_image_of_coco_is_known_in_every_edition() -> None:
    wanted = image_key("/a/coco/train2017/000000000009.jpg")
    assert image_key("/b/train2014/COCO_train2014_000000000009.jpg") == wanted
    assert image_key("/b/val2014/COCO_val2014_000000000010.jpg") != wanted
    assert image_key("/b/mine/000000000009.jpg") == "/b/mine/000000000009.jpg"


def test_a_page_shows_what_is_learned(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    status, _ = run(sound(tmp_path / "data"), *REFCOCO, "--show=1", f"--show_dir={pages}")
    (page,) = pages.iterdir()
    text = page.read_text(encoding="utf-8")
    assert status == 0 and page.name == "refcoco_train.html" and text.count("data:image/png;base64,") == 1
    assert '<span class="learned">' in text and "{seg}" in text


def test_a_page_shows_the_words_of_a_model(tmp_path: Path) -> None:
    built, pages = make_model(), tmp_path / "pages"
    save_model(built.model, built.processor, tmp_path / "model")
    flags = [*REFCOCO, "--show=1", f"--show_dir={pages}", f"--version={tmp_path / 'model'}"]
    assert run(sound(tmp_path / "data"), *flags)[0] == 0
    text = (pages / "refcoco_train.html").read_text(encoding="utf-8")
    learned = text.rpartition('<span class="learned">')[2].partition("</span>")[0]
    assert "[SEG0]" in learned and "ASSISTANT" not in learned


def test_colours_only_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sound(tmp_path / "data")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    run(tmp_path / "data", *REFCOCO)
    assert "\x1b[32m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    run(tmp_path / "data", *REFCOCO)
    assert "\x1b" not in capsys.readouterr().out


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sound(tmp_path / "data")
    assert run_script(check_data.main, [f"--dataset_dir={tmp_path / 'data'}", *REFCOCO, "--json=/dev/null/x"]) == 2
    assert "cannot write /dev/null/x" in capsys.readouterr().err

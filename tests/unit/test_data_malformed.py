"""The usual faults of data files, against every reader they can occur in: one sentence, or a skip that is counted."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit import data_sets
from tests.unit.data_sets import HEIGHT, WIDTH
from utils.data.errors import DataError
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.readers.registry import build_reader

WITHOUT_WORDS = ReaderOptions(explanatory=-1)


@dataclass(frozen=True)
class Family:
    """A data set: who writes it, its main file, and the way in that file to a segmentation and a file name."""

    name: str
    write: Callable[[Path], Path]
    file: str
    segmentation: tuple[Any, ...] = ()
    image: tuple[Any, ...] = ()
    folder: str = ""


def referring(name: str, refs_file: str, folder: str = f"{data_sets.COCO}/train2014") -> Family:
    def write(root: Path) -> Path:
        data_sets.write_refer_seg(root, name, refs_file=refs_file)
        for number in (1, 2, 3):
            data_sets.write_image(root / folder / f"COCO_{number}.jpg")
        return root

    return Family(
        name,
        write,
        f"refer_seg/{name}/instances.json",
        ("annotations", 0, "segmentation"),
        ("images", 0, "file_name"),
        folder,
    )


def parted(name: str) -> Family:
    folder, _ = data_sets.PART_IMAGES[name]
    return Family(
        name,
        lambda root: data_sets.write_parts(root, name),
        data_sets.PART_FILES[name],
        ("annotations", 3, "segmentation"),
        ("images", 0, "file_name"),
        folder,
    )


FAMILIES = (
    referring("refcoco", "refs(unc).p"),
    referring("refcoco+", "refs(unc).p"),
    referring("refcocog", "refs(umd).p"),
    referring("grefcoco", "grefs(unc).json"),
    referring("refclef", "refs(unc).p", "refer_seg/images/saiapr_tc-12"),
    *(parted(name) for name in data_sets.PART_FILES),
    Family(
        "MultiReasonSeg",
        data_sets.write_muse,
        "muse/muse_train.json",
        (0, "answers", 0, 0, "segmentation"),
        (0, "file_name"),
        f"{data_sets.COCO}/train2014",
    ),
    Family(
        "ReasonSeg",
        data_sets.write_reason_seg,
        "reason_seg/ReasonSeg/train/train_a.json",
        folder="reason_seg/ReasonSeg/train",
    ),
    Family(
        "llava_instruct_150k",
        data_sets.write_vqa,
        "llava_dataset/llava_instruct_150k.json",
        image=(0, "image"),
        folder="coco/train2017",
    ),
    Family("llava_v1_5_mix665k", data_sets.write_mixed, "llava_dataset/llava_v1_5_mix665k.json", image=(0, "image")),
    Family("mapillary", data_sets.write_mapillary, "mapillary/config_v2.0.json", folder="mapillary/training/images"),
)
SEGMENTED = [family for family in FAMILIES if family.segmentation]
IMAGED = [family for family in FAMILIES if family.image]


def named(families: Any) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


def everything(family: Family, root: Path) -> Reader:
    """The reader, once it has read all images and decoded all masks."""
    reader = build_reader(family.name, root, "train", WITHOUT_WORDS)
    for index in range(len(reader)):
        for conversation in reader.read_all(index, np.random.default_rng(0)).conversations:
            for turn in conversation:
                assert all(target.decode().max() > 0 for target in turn.targets)
    return reader


def change(path: Path, place: tuple[Any, ...], value: Any) -> Any:
    """Write `value` at `place` of a JSON file; returns what was there."""
    content = json.loads(path.read_text(encoding="utf-8"))
    holder = content
    for step in place[:-1]:
        holder = holder[step]
    before, holder[place[-1]] = holder[place[-1]], value
    data_sets.write_json(path, content)
    return before


def refused(family: Family, root: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        everything(family, root)
    said = str(caught.value)
    assert "\n" not in said and str(root) in said


@named(FAMILIES)
def test_a_byte_order_mark_is_no_harm(tmp_path: Path, family: Family) -> None:
    path = family.write(tmp_path) / family.file
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(everything(family, tmp_path)) > 0


@named(FAMILIES)
def test_other_encodings_are_refused_but_in_reason_seg(tmp_path: Path, family: Family) -> None:
    path = family.write(tmp_path) / family.file
    content = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps({"note": "café"} | content if isinstance(content, dict) else [*content, "café"])
    path.write_bytes(text.encode().replace(rb"\u00e9", "é".encode("cp1252")))
    if family.name == "ReasonSeg":
        assert len(everything(family, tmp_path)) == 1
    else:
        refused(family, tmp_path, "is not text in utf-8-sig: store it in UTF-8")


@named(FAMILIES)
def test_cut_files_are_refused(tmp_path: Path, family: Family) -> None:
    path = family.write(tmp_path) / family.file
    path.write_bytes(path.read_bytes()[:-7])
    refused(family, tmp_path, "is not valid JSON at line")


@named(SEGMENTED)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"size": [HEIGHT + 1, WIDTH], "counts": [0, (HEIGHT + 1) * WIDTH]}, r"run lengths for a size of \[25, 32\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH - 1]}, "do not add up to 24×32"),
        ({"size": [HEIGHT, WIDTH], "counts": "0"}, "do not add up to 24×32"),
        ([[1, 1, float("nan"), 4, 9, 1]], "not finite"),
        ([[1, 1, float("inf"), 4, 9, 1]], "not finite"),
        ([[1, 1, 4, 4, 9]], "x0 y0 x1 y1"),
        ("a string", "neither polygons nor run lengths"),
    ],
)
def test_impossible_segmentations_are_refused(tmp_path: Path, family: Family, fault: Any, said: str) -> None:
    path = family.write(tmp_path) / family.file
    change(path, family.segmentation, fault)
    refused(family, tmp_path, said)


@named(SEGMENTED)
@pytest.mark.parametrize(
    "fault",
    [[], [[]], [[1, 1, 5, 5]], [[4, 4, 4, 4, 4, 4]], [[1, 1, 5, 5, 9, 9]]],
    ids=["none", "empty", "two points", "one place", "a line"],
)
def test_segmentations_without_an_inside_are_counted(tmp_path: Path, family: Family, fault: Any) -> None:
    path = family.write(tmp_path) / family.file
    before = everything(family, tmp_path).skipped
    change(path, family.segmentation, fault)
    after = everything(family, tmp_path).skipped
    grown = {cause: after[cause] - before[cause] for cause in after if after[cause] > before[cause]}
    assert grown and all("inside" in cause for cause in grown)


@named(SEGMENTED)
def test_boxes_are_not_read(tmp_path: Path, family: Family) -> None:
    path = family.write(tmp_path) / family.file
    content = json.loads(path.read_text(encoding="utf-8"))
    holder = content
    for step in family.segmentation[:-1]:
        holder = holder[step]
    holder["bbox"] = [-5, -5, -1, -1]
    data_sets.write_json(path, content)
    assert len(everything(family, tmp_path)) > 0


@named(IMAGED)
def test_names_that_leave_the_data_root_are_refused(tmp_path: Path, family: Family) -> None:
    root = family.write(tmp_path / "root")
    path = root / family.file
    data_sets.write_image(tmp_path / "secret.jpg")
    usual = change(path, family.image, "x")
    start = usual.rpartition("/")[0]
    for name in ("../" * 8 + "secret.jpg", str(tmp_path / "secret.jpg"), "a\0b.jpg"):
        for full in {name, f"{start}/{name}".lstrip("/")} if start else {name}:
            change(path, family.image, full)
            with pytest.raises(DataError, match="expected a path") as caught:
                everything(family, root)
            assert "secret.jpg, named by" not in str(caught.value), "nothing may be looked for out there"


@named([family for family in FAMILIES if family.folder])
def test_links_out_of_the_data_root_are_refused(tmp_path: Path, family: Family) -> None:
    root = family.write(tmp_path / "root")
    outside = data_sets.write_image(tmp_path / "secret.jpg")
    for image in (root / family.folder).rglob("*.jpg"):
        image.unlink()
        image.symlink_to(outside)
    refused(family, root, r"is a link to .*secret\.jpg, outside the data root .*: put a copy in its place")


def test_a_link_in_place_of_an_annotation_of_reason_seg_is_refused(tmp_path: Path) -> None:
    root = data_sets.write_reason_seg(tmp_path / "root")
    path = root / "reason_seg/ReasonSeg/train/train_a.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DataError, match=r"train_a\.json, named by .*, is a link to .*elsewhere\.json, outside"):
        build_reader("ReasonSeg", root, "train", WITHOUT_WORDS)


@named([family for family in FAMILIES if family.folder and family.name != "ReasonSeg"])
def test_missing_images_are_named(tmp_path: Path, family: Family) -> None:
    root = family.write(tmp_path)
    reader = build_reader(family.name, root, "train", WITHOUT_WORDS)
    for image in (root / family.folder).rglob("*.jpg"):
        image.unlink()
    with pytest.raises(DataError, match=r"the image .*\.jpg, named by .*, is missing") as caught:
        reader.read(0, np.random.default_rng(0))
    assert caught.value.cause == "missing image"


LABEL_MAPS = {
    "ade20k": (data_sets.write_ade20k, "ade20k/annotations/training/ADE_1.png"),
    "cocostuff": (data_sets.write_cocostuff, "cocostuff/train2017/0001.png"),
    "mapillary": (data_sets.write_mapillary, "mapillary/training/v2.0/labels/a.png"),
}


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_label_maps_that_are_cut_coloured_deep_or_links_out(tmp_path: Path, name: str) -> None:
    write, file = LABEL_MAPS[name]
    path = write(tmp_path / "root") / file
    reader = build_reader(name, tmp_path / "root", "train")
    whole = path.read_bytes()

    def said() -> tuple[str, str]:
        with pytest.raises(DataError) as caught:
            reader.read(0, np.random.default_rng(0))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value), caught.value.cause

    path.write_bytes(whole[: len(whole) // 2])
    assert "is not an image that can be opened" in said()[0] and said()[1] == "damaged image"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    assert "another edition" in said()[0]
    Image.fromarray(np.full((HEIGHT, WIDTH), 300, dtype=np.uint16)).save(path)
    assert "expected one class number of 8 bits per pixel" in said()[0]
    path.unlink()
    (tmp_path / "elsewhere.png").write_bytes(whole)
    path.symlink_to(tmp_path / "elsewhere.png")
    assert "outside the data root" in said()[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None])
def test_points_of_reason_seg_that_are_no_numbers(tmp_path: Path, value: Any) -> None:
    path = data_sets.write_reason_seg(tmp_path) / "reason_seg/ReasonSeg/train/train_a.json"
    change(path, ("shapes", 2, "points", 1, 0), value)
    with pytest.raises(DataError, match=r"a shape of .*train_a\.json has a polygon .*not"):
        build_reader("ReasonSeg", tmp_path, "train", WITHOUT_WORDS)


def test_a_ref_without_an_annotation_and_an_annotation_of_an_absent_image(tmp_path: Path) -> None:
    refs = [data_sets.ref(1, 1, 11, "a cup"), data_sets.ref(2, 1, 5000, "lost"), data_sets.ref(3, 404, 99, "absent")]
    root = data_sets.write_refer_seg(tmp_path, found=refs)
    reader = everything(FAMILIES[0], root)
    assert len(reader) == 1 and reader.skipped == {
        "ref to an annotation instances.json does not hold": 1,
        "ref about an image instances.json does not list": 1,
    }
    del refs[0]["ann_id"]
    data_sets.write_refer_seg(tmp_path, found=refs)
    refused(FAMILIES[0], root, "ref 1 of .* has no 'ann_id'")

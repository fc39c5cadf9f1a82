"""Label maps and part annotations: official layouts, class names, unions, crowds and ignored regions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.structures import IGNORE_LABEL
from tests.unit import data_sets
from tests.unit.data_sets import HEIGHT, WIDTH, square
from utils.data.errors import DataError
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.readers.registry import build_reader
from utils.data.readers.sem_seg.part_names import paco_names, partimagenet_names, pascal_part_names
from utils.data.samples import Turn


def turns(reader: Reader, index: int = 0) -> dict[str, Turn]:
    """All turns about an image by the name of their target."""
    sample = reader.read_all(index, np.random.default_rng(0))
    return {turn.targets[0].name: turn for conversation in sample.conversations for turn in conversation}


def counts(turn: Turn) -> tuple[int, int]:
    """Pixels that belong to the target, and that are ignored."""
    mask = turn.targets[0].decode()
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1, IGNORE_LABEL}
    return int((mask == 1).sum()), int((mask == IGNORE_LABEL).sum())


def test_cocostuff_takes_images_from_coco_and_leaves_out_classes_with_a_dash(tmp_path: Path) -> None:
    root = data_sets.write_cocostuff(tmp_path)
    data_sets.write_labels(root / "cocostuff/train2017/0002.png", data_sets.striped((0, 3)))
    data_sets.write_image(root / "coco/train2017/0003.jpg")
    reader = build_reader("cocostuff", root, "train")
    assert reader.skipped == {"image without a label map": 1, "label map without an image": 1}
    found = turns(reader)
    assert list(found) == ["the person", "the sky"]
    assert reader.read(0, np.random.default_rng(0)).image_path.endswith("coco/train2017/0001.jpg")
    assert counts(found["the sky"]) == (10 * WIDTH, 11 * WIDTH) and counts(found["the person"]) == (
        3 * WIDTH,
        11 * WIDTH,
    )


def test_cocostuff_labels_of_another_edition_are_refused(tmp_path: Path) -> None:
    root = data_sets.write_cocostuff(tmp_path, data_sets.striped((183, 4)))
    with pytest.raises(DataError, match=r"0001\.png holds label 183; expected 0 to 181: use the PNGs of stuffthing"):
        build_reader("cocostuff", root, "train").read(0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "config", "labels"),
    [
        ("mapillary", "config_v2.0.json", "v2.0/labels"),
        ("mapillary|v2.0", "config_v2.0.json", "v2.0/labels"),
        ("mapillary|v1.2", "config_v1.2.json", "v1.2/labels"),
        ("mapillary", "config_v1.2.json", "v1.2/labels"),
        ("mapillary", "config.json", "labels"),
    ],
)
def test_mapillary_in_its_editions(tmp_path: Path, name: str, config: str, labels: str) -> None:
    found = turns(build_reader(name, data_sets.write_mapillary(tmp_path, config, labels), "train"))
    assert list(found) == ["the sky", "the stop line lane marking", "the traffic sign back"]
    rest = HEIGHT - 6 - 4 - 2
    assert counts(found["the sky"]) == (6 * WIDTH, rest * WIDTH)
    assert counts(found["the traffic sign back"]) == (2 * WIDTH, rest * WIDTH)


def test_mapillary_prefers_the_newer_edition_and_reads_the_one_that_is_named(tmp_path: Path) -> None:
    root = data_sets.write_mapillary(data_sets.write_mapillary(tmp_path), "config_v1.2.json", "v1.2/labels", label=0)
    assert "the stop line lane marking" in turns(build_reader("mapillary", root, "train"))
    assert "the stop line lane marking" not in turns(build_reader("mapillary|v1.2", root, "train"))
    with pytest.raises(DataError, match=r"mapillary has the editions v2\.0, v1\.2, not 'v3'"):
        build_reader("mapillary|v3", root, "train")
    with pytest.raises(DataError, match="ade20k has no editions"):
        build_reader("ade20k|v2.0", root, "train")


def test_mapillary_labels_and_config_of_different_editions(tmp_path: Path) -> None:
    root = data_sets.write_mapillary(tmp_path, label=200)
    with pytest.raises(DataError, match=r"a\.png holds label 200; expected 0 to 5: .*config_v2\.0\.json is of another"):
        build_reader("mapillary", root, "train").read(0, np.random.default_rng(0))
    data_sets.write_json(root / "mapillary/config_v2.0.json", {"labels": []})
    with pytest.raises(DataError, match=r"config_v2\.0\.json lists 0 labels"):
        build_reader("mapillary", root, "train")


NAMES = {
    "pascal_part": ["the cow", "the left front leg of the cow"],
    "paco_lvis": ["the mouse", "the left button of the mouse", "the inner body of the can"],
    "partimagenet": ["the car", "the side mirror of the car", "the tire of the bicycle"],
}


@pytest.mark.parametrize("name", data_sets.PART_FILES)
def test_parts_are_united_and_crowds_are_ignored(tmp_path: Path, name: str) -> None:
    reader = build_reader(name, data_sets.write_parts(tmp_path, name), "train")
    assert len(reader) == 1
    assert reader.read(0, np.random.default_rng(0)).image_path.endswith(data_sets.PART_IMAGES[name][1])
    found = turns(reader)
    assert list(found) == NAMES[name]
    thing = 36 + 36 - 9
    # Its first annotation lies wholly under the crowd's 12 × 16 pixels, the second (16 pixels) wholly outside.
    assert counts(found[NAMES[name][0]]) == (thing + 16, 12 * 16 - thing)
    if name == "pascal_part":
        assert counts(found["the left front leg of the cow"]) == (9 + 9 - 1, 0)
    assert reader.skipped == {
        "annotation without a polygon that has an inside": 3,
        "annotation of an image that is not listed": 1,
        "class of an image with a crowd region only": 1,
        "image without a usable annotation": 1,
    }


def test_pascals_abbreviations_are_spelled_out() -> None:
    told = {
        "cow:lfleg": "left front leg of the cow",
        "cow:rblleg": "right back lower leg of the cow",
        "cow:rear": "right ear of the cow",
        "person:llarm": "left lower arm of the person",
        "person:lebrow": "left eyebrow of the person",
        "person:hair": "hair of the person",
        "bird:lleg": "left leg of the bird",
        "dog:rfpa": "right front paw of the dog",
        "horse:lbho": "left back hoof of the horse",
        "sheep:lhorn": "left horn of the sheep",
        "car:wheel_3": "wheel of the car",
        "bus:bliplate": "back license plate of the bus",
        "train:hleftside": "left side of the head of the train",
        "train:coach_2": "coach of the train",
        "train:croofside_4": "roof of the coach of the train",
        "aeroplane:stern": "stern of the aeroplane",
        "motorbike:fwheel": "front wheel of the motorbike",
        "pottedplant:plant": "plant of the potted plant",
        "tvmonitor:screen": "screen of the monitor",
        "boat": "boat",
    }
    assert pascal_part_names(dict(enumerate(told))) == dict(enumerate(told.values()))


def test_brackets_stay_only_where_they_tell_things_apart() -> None:
    assert paco_names({1: "mouse_(computer_equipment)", 5: "trash_can:rim", 9: "mouse_(computer_equipment):wheel"}) == {
        1: "mouse",
        5: "rim of the trash can",
        9: "wheel of the mouse",
    }
    assert paco_names({1: "bow_(weapon)", 2: "bow_(decorative_ribbons)", 3: "cup"}) == {
        1: "bow (weapon)",
        2: "bow (decorative ribbons)",
        3: "cup",
    }
    assert partimagenet_names({0: "Quadruped Foot", 1: "Bottle:Mouth", 2: "Aeroplane"}) == {
        0: "foot of the quadruped",
        1: "mouth of the bottle",
        2: "aeroplane",
    }


def changed(tmp_path: Path, name: str, change: dict[str, Any]) -> Path:
    """The set `name` with entries of its first image's record replaced."""
    root = data_sets.write_parts(tmp_path, name)
    path = root / data_sets.PART_FILES[name]
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"][0] |= change
    data_sets.write_json(path, content)
    return root


def test_classes_that_lvis_did_not_mark_everywhere_are_left_out(tmp_path: Path) -> None:
    root = changed(tmp_path, "paco_lvis", {"not_exhaustive_category_ids": [3, 77]})
    reader = build_reader("paco_lvis", root, "train")
    assert list(turns(reader)) == NAMES["paco_lvis"][1:]
    assert reader.skipped["class of an image that is not annotated exhaustively"] == 1


def test_paco_images_may_lie_in_mounted_folders(tmp_path: Path) -> None:
    root = data_sets.write_parts(tmp_path / "root", "paco_lvis")
    (root / "coco/train2017").rename(tmp_path / "disk")
    (root / "coco/train2017").symlink_to(tmp_path / "disk")
    build_reader("paco_lvis", root, "train").read(0, np.random.default_rng(0))
    root = changed(root, "paco_lvis", {"file_name": "0001.jpg"})
    with pytest.raises(DataError, match=r"'0001\.jpg'; expected a path that begins with train2017 or val2017"):
        build_reader("paco_lvis", root, "train")


def test_partimagenet_in_folders_of_classes_and_as_vlpart_formats_it(tmp_path: Path) -> None:
    root = data_sets.write_parts(tmp_path, "partimagenet")
    folder = root / "vlpart/partimagenet"
    (folder / "train/n01").mkdir()
    (folder / "train/n01_1.jpg").rename(folder / "train/n01/n01_1.jpg")
    sample = build_reader("partimagenet", root, "train").read(0, np.random.default_rng(0))
    assert sample.image_path.endswith("train/n01/n01_1.jpg")
    content = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    content["images"][0]["file_name"] = "n01/n01_1.jpg"
    data_sets.write_json(folder / "train_format.json", content)
    (folder / "train.json").unlink()
    again = build_reader("partimagenet", root, "train").read(0, np.random.default_rng(0))
    assert again.image_path == sample.image_path


@pytest.mark.parametrize("name", data_sets.PART_FILES)
def test_what_is_asked_for_is_drawn(tmp_path: Path, name: str) -> None:
    root = data_sets.write_parts(tmp_path, name)
    reader = build_reader(name, root, "train", ReaderOptions(num_classes_per_sample=1, num_classes_per_question=2))
    drawn = [reader.read(0, np.random.default_rng(number)).conversations for number in range(40)]
    assert {len(conversations) for conversations in drawn} == {1}
    assert {turn.kind for ((turn,),) in drawn} == {"direct", "several"}
    again = [reader.read(0, np.random.default_rng(number)).conversations for number in range(40)]
    assert [turn.question for ((turn,),) in drawn] == [turn.question for ((turn,),) in again]


def one_annotation(segmentation: Any, category_id: int = 3) -> dict[str, Any]:
    return {"annotations": [data_sets.annotation(1, 5, segmentation, category_id)]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            one_annotation({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}),
            r"annotation 1 of .*run lengths for a size of \[32, 24\]; its image has \[24, 32\]",
        ),
        (one_annotation({"size": [HEIGHT, WIDTH], "counts": "0"}), "run lengths that do not add up to 24×32 pixels"),
        (one_annotation([[1, 1, float("nan"), 4, 9, 1]]), "not finite"),
        (one_annotation([square(1, 1, 4)], 77), "category 77, which 'categories' does not list"),
        ({"categories": [{"id": 3, "name": "cow"}, {"id": 3, "name": "dog"}]}, "category 3 .* called 'dog', and 'cow'"),
        ({"categories": [{"id": 3, "name": " "}]}, "category 3 .* is called ''"),
        ({"images": []}, "nothing usable for pascal_part.*annotation of an image that is not listed"),
    ],
)
def test_malformed_part_annotations_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    root = data_sets.write_parts(tmp_path)
    path = root / data_sets.PART_FILES["pascal_part"]
    data_sets.write_json(path, json.loads(path.read_text(encoding="utf-8")) | change)
    with pytest.raises(DataError, match=said) as caught:
        build_reader("pascal_part", root, "train")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_image_listed_twice(tmp_path: Path) -> None:
    root = data_sets.write_parts(tmp_path)
    path = root / data_sets.PART_FILES["pascal_part"]
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"].append(dict(content["images"][0]))
    data_sets.write_json(path, content)
    assert len(build_reader("pascal_part", root, "train")) == 1, "a plain repetition is no harm"
    content["images"][-1]["file_name"] = "2008_3.jpg"
    data_sets.write_image(root / data_sets.PART_IMAGES["pascal_part"][0] / "2008_3.jpg")
    content["images"].append({"id": 8, "file_name": "2008_3.jpg", "height": HEIGHT, "width": WIDTH})
    content["annotations"].append(data_sets.annotation(1, 8, [square(1, 1, 4)], 3))
    data_sets.write_json(path, content)
    reader = build_reader("pascal_part", root, "train")
    assert len(reader) == 1 and reader.skipped["image id listed twice for different images"] == 1

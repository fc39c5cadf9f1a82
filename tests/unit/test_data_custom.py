"""One's own data in its three forms: what is read, what is left out, what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.structures import IGNORE_LABEL
from tests.unit import data_sets
from tests.unit.data_sets import HEIGHT, WIDTH, annotation, message, square
from utils.cli.config import DataConfig
from utils.data.errors import DataError
from utils.data.mixture import build_mixture
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.readers.registry import build_eval_reader, build_reader
from utils.data.samples import Turn

MANY = ReaderOptions(num_classes_per_sample=3, num_classes_per_question=3)


def home(root: Path, name: str = "mine", split: str = "train") -> Path:
    return root / "custom" / name / split


def write_coco(root: Path, spoken: bool, name: str = "mine", split: str = "train", **changes: Any) -> Path:
    records = [
        annotation(1, 1, [square(2, 2, 6)]),
        annotation(2, 1, [square(12, 2, 6)]),
        annotation(3, 2, [[1, 1, 5, 5]]),
        annotation(4, 9, [square(0, 0, 3)]),
    ]
    if spoken:
        records[0]["sentences"] = ["the left cup", {"sent": "cup one"}]
        records[1]["sentences"] = ["the right cup"]
        records[2]["sentences"] = ["a line"]
    images = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in (1, 2)]
    content = {"images": images, "annotations": records, **changes}
    if not spoken:
        content.setdefault("categories", [{"id": 7, "name": "cup"}])
    data_sets.write_json(home(root, name, split) / "annotations.json", content)
    for image in images:
        data_sets.write_image(home(root, name, split) / "images" / image["file_name"])
    return root


def write_class_masks(root: Path, classes: Any = None, label: int = 2) -> Path:
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[:4], labels[4:6], labels[6:7] = label, 3, IGNORE_LABEL
    for name, values in (("a", labels), ("b", np.zeros_like(labels))):
        data_sets.write_image(home(root) / "images" / f"{name}.jpg")
        data_sets.write_labels(home(root) / "masks" / f"{name}.png", values)
    data_sets.write_image(home(root) / "images" / "alone.jpg")
    found = {"2": "sofa", "3": "cat", "9": "dog"} if classes is None else classes
    data_sets.write_json(home(root) / "masks" / "classes.json", found)
    return root


def write_target_masks(root: Path) -> Path:
    mask = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    mask[2:5, 3:9] = (255, 0, 0)
    data_sets.write_image(home(root) / "images" / "a.jpg")
    for name in ("red_cup.png", "the_tray.png", "_.png"):
        data_sets.write_labels(home(root) / "masks" / "a" / name, mask)
    data_sets.write_labels(home(root) / "masks" / "gone" / "cup.png", mask)
    return root


def line(*messages: str, masks: Any = (), image: str = "a.jpg") -> dict[str, Any]:
    roles = ("human", "gpt")
    told = [message(roles[place % 2], text) for place, text in enumerate(messages)]
    return {"image": image, "conversations": told, "masks": list(masks)}


def write_lines(root: Path, records: list[Any]) -> Path:
    path = home(root) / "annotations.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8-sig")
    data_sets.write_image(home(root) / "images" / "a.jpg")
    return root


def reader(root: Path, options: ReaderOptions | None = None) -> Reader:
    return build_reader("custom|mine", root, "train", options)


def turns(found: Reader, index: int = 0) -> list[Turn]:
    sample = found.read_all(index, np.random.default_rng(0))
    return [turn for conversation in sample.conversations for turn in conversation]


def areas(found: Reader, index: int = 0) -> dict[str, int]:
    return {target.name: int((target.decode() == 1).sum()) for turn in turns(found, index) for target in turn.targets}


def test_coco_without_sentences_asks_for_categories(tmp_path: Path) -> None:
    found = reader(write_coco(tmp_path, spoken=False))
    assert len(found) == 1 and areas(found) == {"the cup": 72}
    assert found.image_path(0) == str(home(tmp_path) / "images" / "1.jpg")
    assert found.skipped == {
        "annotation without a polygon that has an inside": 1,
        "annotation of an image that is not listed": 1,
        "image without a usable annotation": 1,
    }


def test_coco_with_sentences_asks_in_those_words(tmp_path: Path) -> None:
    found = reader(write_coco(tmp_path, spoken=True), MANY)
    assert areas(found) == {"the left cup": 36, "the cup one": 36, "the right cup": 36}
    for seed in range(30):
        sample = found.read(0, np.random.default_rng(seed))
        for (turn,) in sample.conversations:
            assert len({id(target.decode) for target in turn.targets}) == len(turn.targets)


def test_class_numbers_in_one_png(tmp_path: Path) -> None:
    found = pickle.loads(pickle.dumps(reader(write_class_masks(tmp_path))))
    assert len(found) == 2 and found.skipped == {"image without a mask": 1}
    assert areas(found) == {"the sofa": 4 * WIDTH, "the cat": 2 * WIDTH}
    mask = turns(found)[0].targets[0].decode()
    assert (mask[6] == IGNORE_LABEL).all() and set(np.unique(mask)) == {0, 1, IGNORE_LABEL}
    (turn,) = turns(found, 1)
    assert turn.kind == "no_target" and turn.targets == ()


def test_one_file_per_target(tmp_path: Path) -> None:
    found = reader(write_target_masks(tmp_path))
    assert areas(found) == {"the red cup": 18, "the tray": 18}
    assert found.skipped == {"mask without an image": 1, "mask whose name says nothing": 1}


def test_lines_hold_conversations(tmp_path: Path) -> None:
    rle = data_sets.rle(np.eye(HEIGHT, WIDTH, dtype=np.uint8))
    data_sets.write_labels(home(tmp_path) / "drawn" / "m.png", np.full((HEIGHT, WIDTH), 7, dtype=np.uint8))
    asked = line(
        "<image>\nWhere are they?",
        "The cup {seg}, and the tray {seg}.",
        "And the rest?",
        "All of it {seg}.",
        "Why?",
        "Because.",
        masks=[[square(2, 2, 6)], rle, "drawn/m.png"],
    )
    broken = [
        line("Where?", "Here {seg} and {seg}.", masks=[[square(0, 0, 2)]]),
        line("Where?", "Here.", masks=[[square(0, 0, 2)]]),
        line("Where {seg}?", "Here."),
        line("Where?"),
        line("Where?", ""),
    ]
    found = reader(write_lines(tmp_path, [asked, line("What?", "A cup."), *broken]))
    assert len(found) == 1
    assert areas(found) == {"The cup": 36, "the tray": HEIGHT, "All of it": HEIGHT * WIDTH}
    assert [turn.kind for turn in turns(found)] == ["several", "direct", "text", "text"]
    assert found.skipped == {
        "answer with more {seg} than masks": 1,
        "answer with fewer {seg} than masks": 1,
        "conversation with {seg} in a question": 1,
        "conversation that does not alternate between human and gpt": 1,
        "conversation with an empty message": 1,
    }


def test_flags_and_scores_name_it(tmp_path: Path) -> None:
    write_coco(tmp_path, spoken=False, name="one")
    write_coco(tmp_path, spoken=True, name="two", split="val")
    flags = {"dataset": "custom", "sample_rates": "1", "custom_data": "one"}
    mixture = build_mixture(DataConfig(dataset_dir=str(tmp_path), **flags), seed=0)
    assert mixture[0].dataset == "custom|one"
    assert len(build_eval_reader("custom|two|val", tmp_path)) == 1


@pytest.mark.parametrize(
    ("write", "cause", "said"),
    [
        (lambda root: home(root).joinpath("images").mkdir(parents=True), "no annotations", "expected one of"),
        (
            lambda root: write_class_masks(write_coco(root, spoken=False)),
            "annotations in two forms",
            "annotations.json and masks",
        ),
        (lambda root: write_class_masks(root, classes={}), "empty class list", "names no class"),
        (lambda root: write_class_masks(root, classes={"0": "x"}), "unusable annotation", "numbers from 1 to 254"),
        (lambda root: write_coco(root, spoken=False, categories=[]), "empty class list", "lists no category"),
        (lambda root: write_lines(root, ["no object"]), "malformed annotation", "line 1 of"),
        (lambda root: write_lines(root, [line("a", "b {seg}", masks=[3])]), "malformed segmentation", "line 1 of"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, write: Any, cause: str, said: str) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=said) as caught:
        reader(tmp_path)
    assert caught.value.cause == cause


@pytest.mark.parametrize(
    ("mask", "cause"),
    [
        ("gone.png", "missing mask"),
        ("../../../../outside.png", "path out of the data root"),
        ([[1, 1, 5, 5]], "mask without a polygon that has an inside"),
        ([[1, 1, float("nan"), 5, 9, 9]], "coordinate that is not finite"),
        ({"size": [HEIGHT, WIDTH + 1], "counts": [0, HEIGHT * (WIDTH + 1)]}, "run lengths of another size"),
    ],
)
def test_a_mask_that_cannot_be_used_costs_its_image(tmp_path: Path, mask: Any, cause: str) -> None:
    found = reader(write_lines(tmp_path, [line("a", "b {seg}", masks=[mask])]))
    with pytest.raises(DataError) as caught:
        turns(found)
    assert caught.value.cause == cause


def test_a_label_without_a_name_costs_its_image(tmp_path: Path) -> None:
    found = reader(write_class_masks(tmp_path, label=77))
    with pytest.raises(DataError, match="label 77") as caught:
        turns(found)
    assert caught.value.cause == "label map of another edition"


@pytest.mark.parametrize("name", ["custom|..", "custom|a/b", "custom|"])
def test_names_stay_below_custom(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="plain names"):
        build_reader(name, tmp_path, "train")


def test_images_are_png_too(tmp_path: Path) -> None:
    write_target_masks(tmp_path)
    (home(tmp_path) / "images" / "a.jpg").unlink()
    Image.new("RGB", (WIDTH, HEIGHT)).save(home(tmp_path) / "images" / "a.png")
    assert areas(reader(tmp_path))


def test_the_example_in_the_repository_can_be_read() -> None:
    """8 and 4 images with 3 conversations each; polygons and run lengths are masks of the image's size."""
    root = Path(__file__).parents[2] / "dataset"
    for split, images in (("train", 8), ("val", 4)):
        samples = list(build_eval_reader(f"custom|shapes|{split}", root))
        turns = [turn for sample in samples for conversation in sample.conversations for turn in conversation]
        assert (len({sample.image_path for sample in samples}), len(turns)) == (images, 3 * images)
        for target in (target for turn in turns for target in turn.targets):
            mask = target.decode()
            assert mask.shape == (112, 112) and 200 < mask.sum() < 2000, "a shape of 20 to 41 pixels"

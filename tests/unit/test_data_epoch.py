"""An epoch over every reader, each on 2,000 made-up images: nothing raises, each image comes once, with masks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit import data_sets
from tests.unit.data_sets import HEIGHT, WIDTH, annotation, message, square
from tests.unit.tokenizer_kinds import make_processor
from utils.data.dataset import TrainingDataset
from utils.data.mixture import Mixture
from utils.data.readers.base import ReaderOptions
from utils.data.readers.registry import build_reader

IMAGES = 2000
SIZES = {"height": HEIGHT, "width": WIDTH}
OPTIONS = ReaderOptions(num_classes_per_sample=3, num_classes_per_question=3, use_expand_question_list=True)


def copies(first: Path, name: Callable[[int], str]) -> None:
    """`first` under IMAGES names beside it, without taking more room."""
    for number in range(IMAGES):
        target = first.parent / name(number)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(first, target)
    first.unlink()


def label_maps(images: str, labels: str, values: tuple[tuple[int, int], ...], config: str = "") -> Any:
    def write(root: Path) -> None:
        copies(data_sets.write_image(root / images / "first.jpg"), "{:06}.jpg".format)
        copies(data_sets.write_labels(root / labels / "first.png", data_sets.striped(*values)), "{:06}.png".format)
        if config:
            data_sets.write_json(root / config, {"labels": data_sets.MAPILLARY_LABELS})

    return write


def marked(number: int) -> list[dict[str, Any]]:
    """Two things in image `number`, one of them of two parts, and every seventh time a crowd."""
    place = number % 12
    things = [annotation(3 * number, number, [square(place, 2, 6), square(place + 3, 5, 6)], 3)]
    things.append(annotation(3 * number + 1, number, [square(1, 12, 3 + place % 5)], 8))
    if number % 7 == 0:
        runs = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 20, HEIGHT * 4, HEIGHT * 8]}
        things.append(annotation(3 * number + 2, number, runs, 3, iscrowd=1))
    return things


def coco(name: Callable[[int], str]) -> dict[str, Any]:
    return {
        "images": [{"id": number, "file_name": name(number), **SIZES} for number in range(IMAGES)],
        "annotations": [one for number in range(IMAGES) for one in marked(number)],
    }


def parts(name: str) -> Any:
    folder, image = data_sets.PART_IMAGES[name]

    def write(root: Path) -> None:
        prefix = image.rpartition("1.jpg")[0]
        first = data_sets.write_image(root / folder / f"{prefix}first.jpg")
        copies(first, lambda number: f"{prefix.rpartition('/')[2]}{number}.jpg")
        found = coco(lambda number: f"{prefix}{number}.jpg")
        found["categories"] = [{"id": n, "name": said} for n, said in data_sets.PART_CATEGORIES[name].items()]
        data_sets.write_json(root / data_sets.PART_FILES[name], found)

    return write


def referring(name: str, refs_file: str, folder: str = f"{data_sets.COCO}/train2014") -> Any:
    def write(root: Path) -> None:
        def asked(number: int) -> list[dict[str, Any]]:
            several: Any = [3 * number, 3 * number + 1] if number % 2 else [-1]
            group = several if name == "grefcoco" else 3 * number + 1
            thing = data_sets.ref(2 * number, number, 3 * number, f"cup {number}", "the one with two parts")
            return [thing, data_sets.ref(2 * number + 1, number, group, "small thing")]

        data_sets.write_refer_seg(root, name, [one for number in range(IMAGES) for one in asked(number)], refs_file)
        categories = [{"id": 3, "name": "cup"}, {"id": 8, "name": "tray"}]
        found = coco("{}.jpg".format) | {"categories": categories}
        data_sets.write_json(root / "refer_seg" / name / "instances.json", found)
        copies(data_sets.write_image(root / folder / "first.jpg"), "{}.jpg".format)

    return write


def muse(root: Path) -> None:
    def record(number: int) -> dict[str, Any]:
        cup, tray = (data_sets.muse_instance(n, [square(number % 9, 3, 5)]) for n in ("cup", "tray"))
        asked = ["What can I drink from?", "What is needed to serve?", "What burns?"]
        return {"file_name": f"{number}.jpg", **SIZES, "questions": asked, "answers": [[cup], [cup, tray], []]}

    data_sets.write_json(root / "muse" / "muse_train.json", [record(number) for number in range(IMAGES)])
    copies(data_sets.write_image(root / data_sets.COCO / "train2014" / "first.jpg"), "{}.jpg".format)


def llava(name: str, before: str) -> Any:
    def write(root: Path) -> None:
        talk = [message("human", "<image>\nWhat is it?"), message("gpt", "A cup."), message("human", "And that?")]
        talk.append(message("gpt", "A tray."))
        records = [{"id": str(n), "image": f"{before}{n}.jpg", "conversations": talk} for n in range(IMAGES)]
        data_sets.write_json(root / "llava_dataset" / f"{name}.json", records)
        copies(data_sets.write_image(root / "coco/train2017" / "first.jpg"), "{}.jpg".format)

    return write


def reason(root: Path) -> None:
    data_sets.write_reason_seg(root)
    folder = root / "reason_seg" / "ReasonSeg" / "train"
    copies(folder / "train_a.jpg", "{}.jpg".format)
    copies(folder / "train_a.json", "{}.json".format)


def own(form: str) -> Any:
    def write(root: Path) -> None:
        home = root / "custom" / "mine" / "train"
        copies(data_sets.write_image(home / "images" / "first.jpg"), "{}.jpg".format)
        outline = [[square(n % 9, 3, 5)] for n in range(IMAGES)]
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[3:9, 4:20] = 2
        if form == "coco":
            found = coco("{}.jpg".format) | {"categories": [{"id": 3, "name": "cup"}, {"id": 8, "name": "tray"}]}
            data_sets.write_json(home / "annotations.json", found)
        elif form == "lines":
            told = [message("human", "What can I drink from?"), message("gpt", "From the cup {seg}.")]
            lines = [{"image": f"{n}.jpg", "conversations": told, "masks": [outline[n]]} for n in range(IMAGES)]
            text = "\n".join(map(data_sets.json.dumps, lines))
            (home / "annotations.jsonl").write_text(text, encoding="utf-8")
        elif form == "classes":
            copies(data_sets.write_labels(home / "masks" / "first.png", mask), "{}.png".format)
            data_sets.write_json(home / "masks" / "classes.json", {"2": "sofa"})
        else:
            copies(data_sets.write_labels(home / "masks" / "first.png", mask), "{}/red_cup.png".format)

    return write


SETS: dict[str, tuple[str, Any]] = {
    "ade20k": (
        "ade20k",
        label_maps("ade20k/images/training", "ade20k/annotations/training", ((1, 9), (0, 4), (3, 11))),
    ),
    "cocostuff": ("cocostuff", label_maps("coco/train2017", "cocostuff/train2017", ((156, 9), (172, 4), (0, 9)))),
    "mapillary": (
        "mapillary",
        label_maps(
            "mapillary/training/images",
            "mapillary/training/v2.0/labels",
            ((0, 9), (1, 15)),
            "mapillary/config_v2.0.json",
        ),
    ),
    "mapillary v1.2": (
        "mapillary|v1.2",
        label_maps(
            "mapillary/training/images", "mapillary/training/labels", ((0, 9), (1, 15)), "mapillary/config.json"
        ),
    ),
    **{name: (name, parts(name)) for name in data_sets.PART_FILES},
    "refcoco": ("refcoco", referring("refcoco", "refs(unc).p")),
    "refcoco+": ("refcoco+", referring("refcoco+", "refs(unc).p")),
    "refcocog": ("refcocog", referring("refcocog", "refs(umd).p")),
    "refcocog google": ("refcocog|google", referring("refcocog", "refs(google).p")),
    "grefcoco": ("grefcoco", referring("grefcoco", "grefs(unc).json")),
    "refclef": ("refclef", referring("refclef", "refs(unc).p", "refer_seg/images/saiapr_tc-12")),
    "llava_instruct_150k": ("llava_instruct_150k", llava("llava_instruct_150k", "")),
    "llava_v1_5_mix665k": ("llava_v1_5_mix665k", llava("llava_v1_5_mix665k", "coco/train2017/")),
    "MUSE": ("MultiReasonSeg", muse),
    "ReasonSeg": ("ReasonSeg", reason),
    **{f"custom {form}": ("custom|mine", own(form)) for form in ("coco", "lines", "classes", "targets")},
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", SETS)
def test_an_epoch_over_every_reader(which: str, tmp_path: Path) -> None:
    name, write = SETS[which]
    write(tmp_path)
    reader = build_reader(name, tmp_path, "train", OPTIONS)
    assert len(reader) == IMAGES
    dataset = TrainingDataset(Mixture([reader], [1.0], seed=1), make_processor("fast_llama"), IMAGES, strict=True)
    seen, masks = set(), 0
    for number in range(IMAGES):
        example = dataset[number]
        seen.add(example.info["sample_id"])
        masks += len(example.masks)
    assert len(seen) == IMAGES, "each image once"
    assert (masks >= IMAGES) == (not which.startswith("llava"))

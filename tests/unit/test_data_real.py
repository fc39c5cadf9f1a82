"""The readers on real images and annotations; areas and texts were computed without them (expected.json)."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.structures import IGNORE_LABEL
from utils.cli.config import DataConfig
from utils.data.masks import parse_coco_mask
from utils.data.mixture import build_mixture
from utils.data.readers.base import ReaderOptions
from utils.data.readers.registry import build_eval_reader, build_reader
from utils.data.readers.sem_seg.label_map_classes import COCO_STUFF_CLASSES
from utils.data.readers.sem_seg.part_names import pascal_part_names
from utils.data.samples import Sample, Turn


@pytest.fixture(scope="module")
def expected(realdata: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((realdata / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(realdata: Path) -> Path:
    return realdata / "dataset"


def all_turns(samples: list[Sample]) -> list[Turn]:
    return [turn for sample in samples for conversation in sample.conversations for turn in conversation]


def area(turn: Turn) -> int:
    return int((turn.targets[0].decode() == 1).sum())


@pytest.mark.parametrize("name", ["refcoco", "grefcoco"])
def test_referring_sets(root: Path, expected: dict[str, list[dict[str, Any]]], name: str) -> None:
    samples = [
        sample
        for split in ("train", "val")
        for reader in [build_reader(name, root, split)]
        for sample in (reader.read_all(index, np.random.default_rng(0)) for index in range(len(reader)))
    ]
    wanted = {entry["image_id"]: entry for entry in expected["coco_masks"] if "sent" in entry}
    seen = set()
    for sample in samples:
        (turn,) = all_turns([sample])
        image_id = int(sample.sample_id.split("/")[-1])
        if turn.kind == "no_target":
            continue
        seen.add(image_id)
        entry = wanted[image_id]
        assert area(turn) == entry["mask_area_pycocotools"]
        assert turn.targets[0].name.split()[-2:] == entry["sent"].replace(",", "").split()[-2:]
        assert turn.targets[0].decode().shape == (entry["height"], entry["width"])
    assert seen == set(wanted)
    kinds = [turn.kind for turn in all_turns(samples)]
    assert kinds.count("no_target") == (2 if name == "grefcoco" else 0) and kinds.count("direct") == 8


def test_coco_annotations_with_a_crowd(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    found = json.loads((root / "coco/annotations/instances_train2017.json").read_text(encoding="utf-8"))
    sizes = {image["id"]: (image["height"], image["width"]) for image in found["images"]}
    areas = {}
    for annotation in found["annotations"]:
        source = parse_coco_mask(annotation["segmentation"], *sizes[annotation["image_id"]], "it")
        assert source is not None
        areas[annotation["id"]] = int(source().sum())
    wanted = {
        entry["ann_id"]: entry["mask_area_pycocotools"] for entry in expected["coco_masks"] if "sent" not in entry
    }
    assert areas == wanted


def test_ade20k(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    reader = build_reader("ade20k", root, "train")
    for index, entry in enumerate(expected["ade20k"]):
        sample = reader.read_all(index, np.random.default_rng(0))
        assert sample.sample_id.endswith(entry["name"])
        counts = [count for label, count in entry["label_counts"].items() if label != "0"]
        turns = all_turns([sample])
        assert [area(turn) for turn in turns] == counts
        assert (turns[0].targets[0].decode() == IGNORE_LABEL).sum() == entry["label_counts"]["0"]


def counted(sample: Sample) -> dict[str, tuple[int, int]]:
    """By the name of each target of a sample: how many pixels it has, and how many are ignored."""
    masks = {turn.targets[0].name: turn.targets[0].decode() for turn in all_turns([sample])}
    return {name: (int((mask == 1).sum()), int((mask == IGNORE_LABEL).sum())) for name, mask in masks.items()}


def test_cocostuff(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    reader = build_reader("cocostuff", root, "train")
    samples = [reader.read_all(index, np.random.default_rng(0)) for index in range(len(reader))]
    wanted = {f"cocostuff/train/{entry['image_id']:012d}": entry["label_counts"] for entry in expected["cocostuff"]}
    assert {sample.sample_id for sample in samples} == set(wanted)
    for sample in samples:
        labels = wanted[sample.sample_id]
        classes = {f"the {COCO_STUFF_CLASSES[int(label)]}": count for label, count in labels.items() if label != "255"}
        assert counted(sample) == {name: (count, labels["255"]) for name, count in classes.items()}


def test_pascal_part(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    """Only the torsos of two birds overlap, by 22 pixels: a sum would count those twice."""
    reader = build_reader("pascal_part", root, "train")
    assert len(reader) == 2 and not reader.skipped
    found: Counter[str] = Counter()
    for index in range(len(reader)):
        found.update(
            {name: area for name, (area, _) in counted(reader.read_all(index, np.random.default_rng(0))).items()}
        )
    raw = {entry["ann_id"]: entry["name"] for entry in expected["pascal_part"]}
    wanted: Counter[str] = Counter()
    for entry in expected["pascal_part"]:
        wanted[f"the {pascal_part_names(raw)[entry['ann_id']]}"] += entry["area"]
    wanted["the torso of the bird"] -= 22
    assert len(raw) == 38 and found == wanted
    assert "the right ear of the person" in found and "the left lower arm of the person" in found


def test_pascal_part_annotations_one_by_one(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    found = json.loads((root / "vlpart/pascal_part/train.json").read_text(encoding="utf-8"))
    sizes = {image["id"]: (image["height"], image["width"]) for image in found["images"]}
    areas = {}
    for annotation in found["annotations"]:
        source = parse_coco_mask(annotation["segmentation"], *sizes[annotation["image_id"]], "it")
        assert source is not None
        areas[annotation["id"]] = int(source().sum())
    assert areas == {entry["ann_id"]: entry["area"] for entry in expected["pascal_part"]}


def test_paco(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    reader = build_reader("paco_lvis", root, "train")
    (sample,) = [reader.read_all(index, np.random.default_rng(0)) for index in range(len(reader))]
    wanted = {f"the {entry['name']}": (entry["mask_area_pycocotools"], 0) for entry in expected["lvis"]}
    assert counted(sample) == wanted and sample.image_path.endswith("coco/val2017/000000006894.jpg")


def test_reason_seg(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    reader = build_reader("ReasonSeg", root, "train|val", ReaderOptions(explanatory=-1))
    found = {}
    for index in range(len(reader)):
        sample = reader.read_all(index, np.random.default_rng(0))
        found[sample.sample_id.removeprefix("ReasonSeg/") + ".json"] = area(all_turns([sample])[0])
    assert found == {entry["file"]: entry["pixellm_get_mask_from_json_area"] for entry in expected["reason_seg"]}


def test_genuine_explanations(realdata: Path, root: Path, tmp_path: Path) -> None:
    told = json.loads((realdata / "extra/reasonseg_real/explanatory_train_excerpt.json").read_text(encoding="utf-8"))
    train = tmp_path / "reason_seg/ReasonSeg/train"
    train.mkdir(parents=True)
    record = json.loads((root / "reason_seg/ReasonSeg/train/000000005001.json").read_text(encoding="utf-8"))
    for entry in told:
        (train / entry["json"]).write_text(json.dumps(record), encoding="utf-8")
        Image.new("RGB", (640, 480)).save(train / entry["image"])
    explanatory = train.parent / "explanatory"
    explanatory.mkdir()
    (explanatory / "train.json").write_text(json.dumps(told), encoding="utf-8")
    reader = build_reader("ReasonSeg", tmp_path, "train", ReaderOptions(explanatory=1.0))
    turns = all_turns([reader.read(index, np.random.default_rng(0)) for index in range(len(reader))])
    assert {(turn.question, turn.answer) for turn in turns} == {(entry["query"], entry["outputs"]) for entry in told}


def test_muse_and_vqa(root: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    wanted = {entry["image_id"]: entry["mask_area_pycocotools"] for entry in expected["coco_masks"] if "sent" in entry}
    for split, images in (("train", 4), ("val", 2), ("test_less", 2), ("test_many", 2)):
        reader = build_eval_reader(f"MultiReasonSeg|{split}", root)
        assert len(reader) == images
        for sample in reader:
            single, several = all_turns([sample])
            assert single.kind == several.kind == "reasoning"
            assert (single.answer, several.answer) == ("It is {seg}.", "{seg} {seg} {seg}.")
            assert area(single) == wanted[int(sample.sample_id.split("-")[-1])] == area(several)
            assert len(several.targets) == 3
    reader = build_reader("llava_instruct_150k", root, "train")
    samples = [reader.read_all(index, np.random.default_rng(0)) for index in range(len(reader))]
    assert sum(len(sample.conversations) for sample in samples) == 18
    assert all(turn.kind == "text" and "<image>" not in turn.question for turn in all_turns(samples))


def test_all_families_mixed(root: Path) -> None:
    data = DataConfig(
        dataset_dir=str(root),
        dataset="sem_seg||refer_seg||vqa||multi_reason_seg||reason_seg",
        sample_rates="2,9,2,4,1",
        sem_seg_data="ade20k||cocostuff||pascal_part||paco_lvis",
        refer_seg_data="refcoco||grefcoco",
        num_classes_per_question=3,
        use_expand_question_list=True,
    )
    mixed = build_mixture(data, seed=0)
    samples = [mixed[i] for i in range(60)]
    assert {sample.dataset for sample in samples} == {
        *(
            "ade20k",
            "cocostuff",
            "pascal_part",
            "paco_lvis",
            "refcoco",
            "grefcoco",
            "llava_instruct_150k",
            "MultiReasonSeg",
            "ReasonSeg",
        ),
    }
    sizes = {sample.image_path: Image.open(sample.image_path).size[::-1] for sample in samples}
    for sample in samples[:20]:
        for turn in all_turns([sample]):
            assert all(target.decode().shape == sizes[sample.image_path] for target in turn.targets)

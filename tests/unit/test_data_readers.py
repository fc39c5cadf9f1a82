"""Every reader on a small set in its official layout, and on files that are broken in the usual ways."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.structures import IGNORE_LABEL, SEG_MARKER
from tests.unit import data_sets
from tests.unit.data_sets import HEIGHT, WIDTH
from utils.data.errors import DataError
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.readers.registry import FAMILIES, build_eval_reader, build_reader, build_training_readers
from utils.data.samples import NO_IMAGE, Sample, Turn

MANY = ReaderOptions(num_classes_per_sample=10)


def turns(sample: Sample) -> list[Turn]:
    return [turn for conversation in sample.conversations for turn in conversation]


def everything(reader: Reader) -> dict[str, list[Turn]]:
    """All turns by sample."""
    samples = [reader.read_all(index, np.random.default_rng(index)) for index in range(len(reader))]
    assert len({sample.sample_id for sample in samples}) == len(samples)
    return {sample.sample_id: turns(sample) for sample in samples}


def areas(turn: Turn) -> list[int]:
    return [int((target.decode() == 1).sum()) for target in turn.targets]


def test_refer_seg(tmp_path: Path) -> None:
    reader = build_reader("refcoco", data_sets.write_refer_seg(tmp_path), "train", MANY)
    found = everything(reader)
    assert set(found) == {"refcoco/train/1", "refcoco/train/2"}
    first = found["refcoco/train/1"]
    assert [turn.targets[0].name for turn in first] == ["the cup on the left", "the left one", "a light high up"]
    assert all(turn.kind == "direct" for turn in first)
    assert all(turn.targets[0].name in turn.question for turn in first)
    assert all(f"{turn.targets[0].name} {SEG_MARKER}".lower() in turn.answer.lower() for turn in first)
    assert [areas(turn) for turn in first] == [[36], [36], [36 + 36 - 9]]
    assert reader.skipped == {
        "ref to a crowd": 1,
        "ref to an annotation without a polygon that has an inside": 1,
        "ref about an image instances.json does not list": 1,
        "ref to an annotation instances.json does not hold": 1,
    }


def test_refer_seg_draws_conversations_and_joins_single_targets(tmp_path: Path) -> None:
    root = data_sets.write_refer_seg(tmp_path)
    two = build_reader("refcoco", root, "train", ReaderOptions(num_classes_per_sample=2))
    drawn = {tuple(t.targets[0].name for t in turns(two.read(0, np.random.default_rng(n)))) for n in range(60)}
    assert {len(names) for names in drawn} == {2} and len({name for names in drawn for name in names}) == 3
    assert all(len(set(names)) == 2 for names in drawn)
    joined = build_reader("refcoco", root, "train", ReaderOptions(num_classes_per_sample=3, num_classes_per_question=3))
    kinds = set()
    for number in range(60):
        for turn in turns(joined.read(0, np.random.default_rng(number))):
            kinds.add(turn.kind)
            assert len({id(target.decode) for target in turn.targets}) == len(turn.targets), (
                "an object twice in a question"
            )
    assert kinds == {"direct", "several"}


def test_grefcoco_has_several_targets_and_none(tmp_path: Path) -> None:
    refs = [
        data_sets.ref(1, 1, [11, 12], "both things"),
        data_sets.ref(2, 2, [-1], "purple dog"),
        data_sets.ref(3, 2, [21], "big cup"),
        data_sets.ref(4, 3, -1, "green dog"),
    ]
    root = data_sets.write_refer_seg(tmp_path, "grefcoco", refs, "grefs(unc).json")
    found = everything(build_reader("grefcoco", root, "train", ReaderOptions(num_classes_per_question=3)))
    (several,) = found["grefcoco/train/1"]
    assert several.kind == "several" and areas(several) == [36, 63]
    assert [target.name for target in several.targets] == ["the cup", "the traffic light"]
    assert [turn.kind for turn in found["grefcoco/train/2"]] == ["no_target", "direct"]
    absent = found["grefcoco/train/2"][0]
    assert absent.targets == () and SEG_MARKER not in absent.answer and "the purple dog" in absent.question
    assert found["grefcoco/train/3"][0].kind == "no_target"


def test_refcocog_by_its_two_splits(tmp_path: Path) -> None:
    root = data_sets.write_refer_seg(tmp_path, "refcocog", refs_file="refs(umd).p")
    data_sets.write_refer_seg(tmp_path, "refcocog", data_sets.refs()[:2], refs_file="refs(google).p")
    assert len(build_reader("refcocog", root, "train")) == 2
    assert len(build_reader("refcocog|google", root, "train")) == 1
    assert len(build_eval_reader("refcocog|umd|val", root)) == 1
    with pytest.raises(DataError, match="split by umd or google, not by 'unc'"):
        build_reader("refcocog|unc", root, "train")
    with pytest.raises(DataError, match=r"has no split 'testC'; it has train, val"):
        build_reader("refcocog", root, "testC")


def test_refclef_has_lists_of_run_lengths_and_images_of_its_own(tmp_path: Path) -> None:
    halves = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint8)
    halves[0, 2:10, 2:10], halves[1, 6:14, 6:14] = 1, 1
    root = data_sets.write_refer_seg(tmp_path, "refclef", data_sets.refs()[:1])
    content = data_sets.instances()
    content["annotations"][0]["segmentation"] = [data_sets.rle(half) for half in halves]
    data_sets.write_json(root / "refer_seg/refclef/instances.json", content)
    data_sets.write_image(tmp_path / "refer_seg/images/saiapr_tc-12/COCO_1.jpg")
    reader = build_reader("refclef", root, "train")
    sample = reader.read(0, np.random.default_rng(0))
    assert "saiapr_tc-12" in sample.image_path and areas(turns(sample)[0]) == [64 + 64 - 16]
    build_reader("refclef|berkeley", data_sets.write_refer_seg(root, "refclef", refs_file="refs(berkeley).p"), "val")


def test_what_is_listed_twice_under_one_id_is_left_out_of_refer_seg(tmp_path: Path) -> None:
    root = data_sets.write_refer_seg(tmp_path)
    content = data_sets.instances()
    content["annotations"] += [dict(content["annotations"][1]), {**content["annotations"][0], "category_id": 90}]
    content["images"].append({**content["images"][1], "file_name": "COCO_3.jpg"})
    data_sets.write_json(root / "refer_seg/refcoco/instances.json", content)
    reader = build_reader("refcoco", root, "train", MANY)
    assert [turn.targets[0].name for turn in everything(reader)["refcoco/train/1"]] == ["a light high up"]
    assert "refcoco/train/2" not in everything(reader)
    assert reader.skipped["annotation id listed twice for different annotations"] == 1
    assert reader.skipped["image id listed twice for different images"] == 1


def test_exclude_val_looks_at_every_referring_set(tmp_path: Path) -> None:
    root = data_sets.write_refer_seg(tmp_path)
    held_out = [data_sets.ref(1, 2, 21, "cup", split="testA"), data_sets.ref(2, 3, 32, "cup", split="train")]
    data_sets.write_refer_seg(tmp_path, "refcoco+", held_out)
    reader = build_reader("refcoco", root, "train", ReaderOptions(exclude_val=True))
    assert set(everything(reader)) == {"refcoco/train/1"}
    assert reader.skipped["ref about an image of a val or test split"] == 3


def test_vqa(tmp_path: Path) -> None:
    reader = build_reader("llava_instruct_150k", data_sets.write_vqa(tmp_path), "train", MANY)
    assert len(reader) == 2
    sample = reader.read_all(0, np.random.default_rng(0))
    assert [len(conversation) for conversation in sample.conversations] == [2, 1]
    told = [(turn.question, turn.answer, turn.kind) for turn in turns(sample)]
    assert told == [("What is it?", "A cup.", "text"), ("Which colour?", "Blue.", "text"), ("Why?", "Because.", "text")]
    assert sorted(reader.skipped.values()) == [1, 1]
    assert reader.read(1, np.random.default_rng(0)).image_path == NO_IMAGE
    short = build_reader("llava_instruct_150k", tmp_path, "train", ReaderOptions(num_classes_per_sample=1))
    assert len(short.read(0, np.random.default_rng(0)).conversations) == 1


def test_mixed_vqa_has_images_in_several_folders_and_rows_in_words_alone(tmp_path: Path) -> None:
    reader = build_reader("llava_v1_5_mix665k", data_sets.write_mixed(tmp_path), "train", MANY)
    samples = [reader.read_all(index, np.random.default_rng(0)) for index in range(len(reader))]
    assert len({sample.sample_id for sample in samples}) == len(samples) == 8
    paths = [sample.image_path.removeprefix(f"{tmp_path}/") for sample in samples]
    images = [f"{folder}/0001.jpg" for folder in data_sets.MIXED_FOLDERS]
    assert paths == [*images[:3], NO_IMAGE, *images[3:], NO_IMAGE]
    assert [len(sample.conversations) for sample in samples] == [2, *[1] * 7]
    assert [turn.answer for turn in turns(samples[3])] == ["Nobody.", "Never."]
    assert all(turn.kind == "text" and "<image>" not in turn.question for sample in samples for turn in turns(sample))
    (tmp_path / "gqa/images").rename(tmp_path / "gqa/other")
    with pytest.raises(DataError, match=r"the folder .*gqa/images is missing; it comes with images\.zip of GQA"):
        build_reader("llava_v1_5_mix665k", tmp_path, "train")


def test_mixed_vqa_refuses_images_elsewhere_and_other_splits(tmp_path: Path) -> None:
    for name in ("sam/images/0001.jpg", "/etc/passwd", "../0001.jpg", ""):
        record = data_sets.mixed_records()[0] | {"image": name}
        root = data_sets.write_mixed(tmp_path, [record])
        with pytest.raises(DataError, match="expected a path that begins with coco/train2017 or gqa/images"):
            build_reader("llava_v1_5_mix665k", root, "train")
    root = data_sets.write_mixed(tmp_path, [data_sets.mixed_records()[0] | {"image": "coco/train2017/../../up.jpg"}])
    with pytest.raises(DataError, match=r"names the image '\.\./\.\./up\.jpg'; expected a path inside"):
        build_reader("llava_v1_5_mix665k", root, "train").read(0, np.random.default_rng(0))
    with pytest.raises(DataError, match="has no split 'val'; it has train only"):
        build_reader("llava_v1_5_mix665k", root, "val")


def test_muse(tmp_path: Path) -> None:
    reader = build_reader("MultiReasonSeg", data_sets.write_muse(tmp_path), "train", MANY)
    first, second = everything(reader).values()
    assert [(turn.question, turn.answer, turn.kind) for turn in first] == [
        ("What can I drink from?", "Use the cup {seg}.", "reasoning"),
        ("What is needed to serve?", "The cup {seg} and the blue tray {seg}.", "reasoning"),
    ]
    assert [areas(turn) for turn in first] == [[16], [16, 25]]
    assert [turn.kind for turn in second] == ["reasoning", "no_target"] and second[1].targets == ()
    paths = [reader.read(index, np.random.default_rng(0)).image_path for index in range(2)]
    assert paths[0].endswith("train2014/COCO_1.jpg") and paths[1].endswith("val2017/0002.jpg")
    assert reader.skipped == {
        "record without questions": 1,
        "record with unequal numbers of questions and answers": 1,
        "answer with fewer {seg} than masks": 1,
    }
    assert len(build_eval_reader("MultiReasonSeg|test_less", data_sets.write_muse(tmp_path, split="test_less"))) == 2


def test_a_muse_target_of_several_parts_is_their_union(tmp_path: Path) -> None:
    overlapping = [data_sets.square(2, 2, 6), data_sets.square(5, 5, 6)]
    painted = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    painted[3:9, 4:20] = 1
    instances = [
        data_sets.muse_instance("cup", overlapping),
        data_sets.muse_instance("tray", data_sets.rle(painted)),
    ]
    record = {**data_sets.muse_records()[0], "questions": ["Which?"], "answers": [instances], "text_answers": [None]}
    reader = build_reader("MultiReasonSeg", data_sets.write_muse(tmp_path, [record]), "train")
    (turn,) = turns(reader.read(0, np.random.default_rng(0)))
    assert [int(target.decode().max()) for target in turn.targets] == [1, 1], "no pixel counts twice"
    assert areas(turn) == [36 + 36 - 9, 6 * 16]


@pytest.mark.parametrize("split", ["train", "val", "test_less", "test_many"])
def test_muse_in_its_folder_or_where_the_release_has_it(tmp_path: Path, split: str) -> None:
    data_sets.write_muse(tmp_path, split=split)
    file = f"muse_{split}.json"
    (tmp_path / "muse" / file).rename(tmp_path / file)
    assert len(build_reader("MultiReasonSeg", tmp_path, split)) == 2
    data_sets.write_muse(tmp_path, data_sets.muse_records()[:1], split)
    assert len(build_reader("MultiReasonSeg", tmp_path, split)) == 1, "the folder's own file comes first"
    with pytest.raises(DataError, match="MUSE has no split 'test'; it has train, val, test_less, test_many"):
        build_reader("MultiReasonSeg", tmp_path, "test")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-8-sig"])
def test_reason_seg(tmp_path: Path, encoding: str) -> None:
    data_sets.write_reason_seg(tmp_path, encoding=encoding)
    reader = build_reader("ReasonSeg", tmp_path, "train", ReaderOptions(explanatory=-1))
    (turn,) = everything(reader)["ReasonSeg/train/train_a"]
    assert turn.kind == "reasoning" and turn.question.startswith("What would Zoë’s café need? ")
    mask = turn.targets[0].decode()
    assert mask.shape == (HEIGHT, WIDTH)
    assert (mask == IGNORE_LABEL).sum() == 25 and (mask == 1).sum() == 81 + 16 - 25
    assert reader.skipped == {"polygon of fewer than three points": 1}


def test_reason_seg_phrases_splits_and_images_alone(tmp_path: Path) -> None:
    data_sets.write_reason_seg(tmp_path, record=data_sets.reason_record("tallest cup", "", is_sentence=False))
    data_sets.write_reason_seg(tmp_path, "val")
    data_sets.write_image(tmp_path / "reason_seg/ReasonSeg/val/alone.jpg")
    reader = build_reader("ReasonSeg", tmp_path, "train|val", ReaderOptions(explanatory=-1))
    found = everything(reader)
    assert set(found) == {"ReasonSeg/train/train_a", "ReasonSeg/val/val_a"}
    (turn,) = found["ReasonSeg/train/train_a"]
    assert "the tallest cup" in turn.question and turn.targets[0].name == "the tallest cup"
    assert reader.skipped["image without a json file"] == 1


def test_reason_seg_splits_by_name_and_joined(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        data_sets.write_reason_seg(tmp_path, split)
    no_words = ReaderOptions(explanatory=-1)
    for spec, ids in (
        ("ReasonSeg|test", ["ReasonSeg/test/test_a"]),
        ("ReasonSeg|train|val", ["ReasonSeg/train/train_a", "ReasonSeg/val/val_a"]),
        ("ReasonSeg", ["ReasonSeg/train/train_a"]),
    ):
        (reader,) = build_training_readers("reason_seg", spec, tmp_path, no_words)
        assert list(everything(reader)) == ids
    assert [sample.sample_id for sample in build_eval_reader("ReasonSeg|test", tmp_path)] == ["ReasonSeg/test/test_a"]
    (tmp_path / "reason_seg/ReasonSeg/explanatory").mkdir()
    with pytest.raises(DataError, match=r"no split 'explanatory'.*ask for ReasonSeg\|train and set --explanatory"):
        build_training_readers("reason_seg", "ReasonSeg|train|explanatory", tmp_path, no_words)


def test_reason_seg_without_a_polygon_of_the_target(tmp_path: Path) -> None:
    record = data_sets.reason_record("what?") | {"shapes": [data_sets.shape("ignore", *data_sets.corners(1, 1, 5))]}
    with pytest.raises(DataError, match="1 × image without a polygon of the target"):
        build_reader("ReasonSeg", data_sets.write_reason_seg(tmp_path, record=record), "train")


def test_explanations_come_in_their_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_sets.write_reason_seg(tmp_path)
    build_reader("ReasonSeg", tmp_path, "train")
    assert "explanatory/train.json is missing" in caplog.text
    told = [{"query": "Why a cup?", "outputs": "It holds tea.", "image": "train_a.jpg", "json": "train_a.json"}]
    data_sets.write_json(tmp_path / "reason_seg/ReasonSeg/explanatory/train.json", told)
    reader = build_reader("ReasonSeg", tmp_path, "train", ReaderOptions(explanatory=0.25))
    drawn = [turns(reader.read(0, np.random.default_rng(number)))[0] for number in range(400)]
    texts = [turn for turn in drawn if turn.kind == "text"]
    explained = [turn for turn in drawn if turn.targets and "It holds tea." in turn.answer]
    assert all(turn.question == "Why a cup?" and turn.answer == "It holds tea." for turn in texts)
    assert abs(len(texts) - 100) < 40 and abs(len(explained) - 150) < 45
    assert all(turn.targets == () for turn in texts)


def test_ade20k(tmp_path: Path) -> None:
    data_sets.write_ade20k(tmp_path)
    data_sets.write_image(tmp_path / "ade20k/images/training/ADE_2.jpg")
    reader = build_reader("ade20k", tmp_path, "train", ReaderOptions(num_classes_per_question=2))
    assert len(reader) == 1 and reader.skipped["image without a label map"] == 1
    found = everything(reader)["ade20k/train/ADE_1"]
    assert [turn.targets[0].name for turn in found] == ["the wall", "the sky", "the flag"]
    assert [areas(turn) for turn in found] == [[10 * WIDTH], [6 * WIDTH], [4 * WIDTH]]
    assert (found[0].targets[0].decode() == IGNORE_LABEL).sum() == 4 * WIDTH
    kinds = {turn.kind for number in range(20) for turn in turns(reader.read(0, np.random.default_rng(number)))}
    assert kinds == {"direct", "several"}


def test_ade20k_with_nothing_but_other(tmp_path: Path) -> None:
    data_sets.write_ade20k(tmp_path, np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    (turn,) = everything(build_reader("ade20k", tmp_path, "train"))["ade20k/train/ADE_1"]
    assert turn.kind == "no_target"


def test_the_longer_list_of_questions_is_drawn_from(tmp_path: Path) -> None:
    root = data_sets.write_refer_seg(tmp_path)
    asked = []
    for expand in (False, True):
        reader = build_reader("refcoco", root, "train", ReaderOptions(use_expand_question_list=expand))
        asked.append({turns(reader.read(1, np.random.default_rng(number)))[0].question for number in range(300)})
    assert asked[0] < asked[1] and len(asked[1]) == 24


HELD_OUT = {
    "cocostuff|val": (data_sets.write_cocostuff, ("cocostuff/train2017", "coco/train2017"), ("train2017", "val2017")),
    "mapillary|val": (data_sets.write_mapillary, ("mapillary/training",), ("training", "validation")),
    "mapillary|v2.0|val": (data_sets.write_mapillary, ("mapillary/training",), ("training", "validation")),
    "pascal_part|val": (data_sets.write_parts, ("vlpart/pascal_part/train.json",), ("train.json", "val.json")),
}


@pytest.mark.parametrize("spec", HELD_OUT)
def test_held_out_splits_of_semantic_sets(tmp_path: Path, spec: str) -> None:
    write, moved, (old, new) = HELD_OUT[spec]
    write(tmp_path)
    for path in moved:
        (tmp_path / path).rename(tmp_path / path.replace(old, new))
    (sample,) = build_eval_reader(spec, tmp_path)
    assert all(len(conversation) == 1 for conversation in sample.conversations) and len(turns(sample)) >= 2
    with pytest.raises(DataError, match=rf"{spec.split('|')[0]} has no split 'test'; it has train, val"):
        build_eval_reader(spec.rpartition("|")[0] + "|test", tmp_path)


def test_evaluation_samples_never_change_and_are_joined(tmp_path: Path) -> None:
    data_sets.write_refer_seg(data_sets.write_muse(tmp_path, split="val"))
    reader = build_eval_reader("refcoco|unc|val||MultiReasonSeg|val", tmp_path)
    assert [sample.sample_id for sample in reader] == [
        "refcoco/val/3",
        "MultiReasonSeg/val/0-1",
        "MultiReasonSeg/val/1-2",
    ]
    assert [turns(a) == turns(b) for a, b in zip(reader, reader, strict=True)] == [True] * 3
    assert all(len(conversation) == 1 for sample in reader for conversation in sample.conversations)
    for spec, said in (
        ("refcoco", "names no split"),
        ("refcoco|unc|val||", "expected names joined"),
        ("nonsense|val", "there is no reader for 'nonsense'"),
    ):
        with pytest.raises(DataError, match=said):
            build_eval_reader(spec, tmp_path)


def test_data_sets_without_a_reader_are_refused_by_name(tmp_path: Path) -> None:
    supported = "ade20k, cocostuff, mapillary, pascal_part, paco_lvis, partimagenet"
    with pytest.raises(DataError, match=rf"no reader for 'cityscapes' \(--sem_seg_data\); supported are {supported}: "):
        build_training_readers("sem_seg", "cityscapes||ade20k", tmp_path, ReaderOptions())
    with pytest.raises(DataError, match=r"no reader for 'cityscapes'.*refcocog"):
        build_reader("cityscapes", tmp_path, "train")


def test_a_family_that_is_unknown_or_a_set_of_another_family(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"--dataset names 'speech'; expected {', '.join(FAMILIES)}"):
        build_training_readers("speech", "", tmp_path, ReaderOptions())
    with pytest.raises(DataError, match=r"no reader for 'ade20k' \(--refer_seg_data\)"):
        build_training_readers("refer_seg", "refcoco||ade20k", tmp_path, ReaderOptions())
    data_sets.write_reason_seg(data_sets.write_reason_seg(tmp_path), "val")
    (reader,) = build_training_readers("reason_seg", "ReasonSeg|train|val", tmp_path, ReaderOptions(explanatory=-1))
    assert len(reader) == 2


def test_options_are_checked() -> None:
    for wrong in ({"num_classes_per_sample": 0}, {"num_classes_per_question": 0}, {"explanatory": 1.5}):
        with pytest.raises(DataError, match=f"--{next(iter(wrong))} is"):
            ReaderOptions(**wrong)  # type: ignore[arg-type]


# How each family is broken: its data set, who writes it, and its main file.
FAMILY_FILES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "refer_seg": ("refcoco", data_sets.write_refer_seg, "refer_seg/refcoco/instances.json"),
    "refs": (
        "grefcoco",
        lambda root: data_sets.write_refer_seg(root, "grefcoco", refs_file="grefs(unc).json"),
        "refer_seg/grefcoco/grefs(unc).json",
    ),
    "vqa": ("llava_instruct_150k", data_sets.write_vqa, "llava_dataset/llava_instruct_150k.json"),
    "multi_reason_seg": ("MultiReasonSeg", data_sets.write_muse, "muse/muse_train.json"),
    "reason_seg": ("ReasonSeg", data_sets.write_reason_seg, "reason_seg/ReasonSeg/train/train_a.json"),
    "parts": ("pascal_part", data_sets.write_parts, data_sets.PART_FILES["pascal_part"]),
    "mapillary": ("mapillary", data_sets.write_mapillary, "mapillary/config_v2.0.json"),
}


@pytest.mark.parametrize("family", FAMILY_FILES)
def test_cut_wrong_or_unreadable_files_are_named(tmp_path: Path, family: str) -> None:
    name, write, file = FAMILY_FILES[family]
    path = write(tmp_path) / file
    whole = path.read_bytes()
    for content, said in (
        (whole[: len(whole) // 2], "not valid JSON"),
        (b"", "not valid JSON"),
        (b"42", "a whole number; expected"),
        (b'[{"conversations": 3, "image": "x", "questions": 3}]', "expected"),
        (b"\xff\xfe\x00 \x81" * 9, "not text in utf-8-sig|not valid JSON"),
        (b"[" * 100_000, "nests deeper"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said) as caught:
            build_reader(name, tmp_path, "train")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


MISSING_KEYS = [
    ("refer_seg", ["images"], ""),
    ("refer_seg", ["annotations"], ""),
    ("refer_seg", ["categories"], ""),
    ("refer_seg", ["images", 0, "file_name"], "image 1"),
    ("refer_seg", ["images", 0, "height"], "image 1"),
    ("refer_seg", ["annotations", 0, "segmentation"], "annotation 11"),
    ("refer_seg", ["annotations", 0, "image_id"], "an annotation"),
    ("refer_seg", ["annotations", 0, "category_id"], "annotation 11"),
    ("refs", [0, "split"], "a ref"),
    ("refs", [0, "image_id"], "a ref"),
    ("refs", [0, "ann_id"], "ref 1"),
    ("refs", [0, "sentences"], "ref 1"),
    ("refs", [0, "sentences", 0, "sent"], "ref 1"),
    ("vqa", [0, "conversations"], "record 0"),
    ("vqa", [0, "conversations", 0, "value"], "record 0"),
    ("multi_reason_seg", [0, "answers"], "record 0"),
    ("multi_reason_seg", [0, "height"], "record 0"),
    ("multi_reason_seg", [1, "coco_url"], "record 1"),
    ("multi_reason_seg", [0, "answers", 0, 0, "segmentation"], "record 0"),
    ("multi_reason_seg", [0, "answers", 0, 0, "category_name"], "record 0"),
    ("reason_seg", ["text"], ""),
    ("reason_seg", ["shapes"], ""),
    ("reason_seg", ["is_sentence"], ""),
    ("reason_seg", ["shapes", 0, "points"], "a shape"),
    ("parts", ["images"], ""),
    ("parts", ["annotations"], ""),
    ("parts", ["categories"], ""),
    ("parts", ["images", 0, "file_name"], "image 5"),
    ("parts", ["images", 0, "width"], "image 5"),
    ("parts", ["annotations", 0, "segmentation"], "annotation 1"),
    ("parts", ["annotations", 0, "image_id"], "an annotation"),
    ("parts", ["annotations", 0, "category_id"], "annotation 1"),
    ("parts", ["categories", 1, "name"], "category 8"),
    ("mapillary", ["labels"], ""),
    ("mapillary", ["labels", 0, "name"], "label 0"),
    ("mapillary", ["labels", 0, "readable"], "label 0"),
]


@pytest.mark.parametrize(("family", "place", "record"), MISSING_KEYS, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("instead", ["absent", None, 1.5])
def test_missing_keys_and_wrong_types_are_named(
    tmp_path: Path, family: str, place: list[Any], record: str, instead: Any
) -> None:
    name, write, file = FAMILY_FILES[family]
    path = write(tmp_path) / file
    content = json.loads(path.read_text(encoding="utf-8"))
    holder = content
    for step in place[:-1]:
        holder = holder[step]
    if instead == "absent":
        del holder[place[-1]]
    else:
        holder[place[-1]] = instead
    data_sets.write_json(path, content)
    with pytest.raises(DataError) as caught:
        build_reader(name, tmp_path, "train")
    said = str(caught.value)
    assert str(path) in said and record in said and "\n" not in said
    assert repr(place[-1]) in said or "neither polygons" in said or "polygon" in said


@pytest.mark.parametrize(
    ("name", "write", "image"),
    [
        ("refcoco", data_sets.write_refer_seg, f"{data_sets.COCO}/train2014/COCO_1.jpg"),
        ("llava_instruct_150k", data_sets.write_vqa, "coco/train2017/0001.jpg"),
        ("MultiReasonSeg", data_sets.write_muse, f"{data_sets.COCO}/train2014/COCO_1.jpg"),
        ("pascal_part", data_sets.write_parts, "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/2008_1.jpg"),
    ],
)
def test_a_missing_image_is_named_when_it_is_read(
    tmp_path: Path, name: str, write: Callable[[Path], Path], image: str
) -> None:
    reader = build_reader(name, write(tmp_path), "train")
    (tmp_path / image).unlink()
    with pytest.raises(DataError, match=rf"{image}, named by .*\.json, is missing"):
        reader.read(0, np.random.default_rng(0))


def test_broken_label_maps_and_images(tmp_path: Path) -> None:
    def read() -> None:
        build_reader("ade20k", tmp_path, "train").read(0, np.random.default_rng(0))

    data_sets.write_ade20k(tmp_path, np.full((HEIGHT, WIDTH), 151, dtype=np.uint8))
    with pytest.raises(DataError, match=r"ADE_1\.png holds label 151; expected 0 to 150: use ADEChallengeData2016"):
        read()
    data_sets.write_ade20k(tmp_path, np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"ADE_1\.png holds uint8 of shape .*another edition"):
        read()
    label = tmp_path / "ade20k/annotations/training/ADE_1.png"
    label.write_bytes(label.read_bytes()[:40])
    with pytest.raises(DataError, match=r"ADE_1\.png is not an image"):
        read()
    label.unlink()
    with pytest.raises(
        DataError, match=r"holds nothing usable for ade20k, split 'train'.*1 × image without a label map"
    ):
        read()
    data_sets.write_reason_seg(tmp_path)
    image = tmp_path / "reason_seg/ReasonSeg/train/train_a.jpg"
    image.write_text("no image")
    with pytest.raises(DataError, match=r"train_a\.jpg is not an image"):
        build_reader("ReasonSeg", tmp_path, "train", ReaderOptions(explanatory=-1)).read(0, np.random.default_rng(0))


def test_pickled_refs_that_are_cut_or_carry_code(tmp_path: Path) -> None:
    root = data_sets.write_refer_seg(tmp_path)
    path = root / "refer_seg/refcoco/refs(unc).p"
    whole = path.read_bytes()
    for content in (whole[:-40], pickle.dumps([print]), b"text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"refs\(unc\)\.p is not a pickle of plain data"):
            build_reader("refcoco", root, "train")
    path.write_bytes(pickle.dumps({"not": "a list"}))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is an object; expected a list"):
        build_reader("refcoco", root, "train")


@pytest.mark.parametrize(
    ("name", "absent", "archive"),
    [
        ("ade20k", "ade20k/images/training", r"ADEChallengeData2016\.zip"),
        ("cocostuff", "coco/train2017", r"train2017\.zip"),
        ("mapillary", r"mapillary/config_v2\.0\.json", "Mapillary Vistas"),
        ("mapillary|v1.2", r"mapillary/config_v1\.2\.json", "Mapillary Vistas"),
        ("pascal_part", r"vlpart/pascal_part/train\.json", r"train\.json of Pascal-Part"),
        ("paco_lvis", r"vlpart/paco/annotations/paco_lvis_v1_train\.json", r"paco_lvis_v1\.zip"),
        ("partimagenet", r"vlpart/partimagenet/train_format\.json", "PartImageNet"),
        ("refclef", r"refer_seg/refclef/refs\(unc\)\.p", r"refclef\.zip"),
        ("refcoco", r"refer_seg/refcoco/refs\(unc\)\.p", r"refcoco\.zip"),
        ("refcoco+", r"refer_seg/refcoco\+/refs\(unc\)\.p", r"refcoco\+\.zip"),
        ("refcocog", r"refer_seg/refcocog/refs\(umd\)\.p", r"refcocog\.zip"),
        ("grefcoco", r"refer_seg/grefcoco/grefs\(unc\)\.json", "gRefCOCO"),
        ("llava_instruct_150k", "llava_dataset/llava_instruct_150k.json", "LLaVA-Instruct-150K"),
        ("MultiReasonSeg", "muse/muse_train.json", "PixelLM's page"),
        ("ReasonSeg", "reason_seg/ReasonSeg/train", "LISA's page"),
    ],
)
def test_an_absent_data_set_is_named_by_its_path_and_archive(
    tmp_path: Path, name: str, absent: str, archive: str
) -> None:
    with pytest.raises(DataError, match=rf"{absent} is missing; it comes with .*{archive}.*dataset/README\.md") as told:
        build_reader(name, tmp_path, "train")
    assert "\n" not in str(told.value)
    with pytest.raises(DataError, match="no data root"):
        build_reader(name, tmp_path / "nowhere", "train")


def test_images_folders_are_looked_for_before_training(tmp_path: Path) -> None:
    data_sets.write_parts(tmp_path)
    (tmp_path / "vlpart/pascal_part/VOCdevkit").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"the folder .*VOC2010/JPEGImages is missing; .*VOCtrainval_03-May-2010\.tar"):
        build_reader("pascal_part", tmp_path, "train")
    data_sets.write_parts(tmp_path, "paco_lvis")
    (tmp_path / "coco/train2017").rename(tmp_path / "elsewhere2")
    with pytest.raises(DataError, match=r"the folder .*coco/train2017 is missing; .*train2017\.zip"):
        build_reader("paco_lvis", tmp_path, "train")


def test_files_with_nothing_usable_say_why(tmp_path: Path) -> None:
    data_sets.write_muse(tmp_path, [{"file_name": "a.jpg"}])
    with pytest.raises(DataError, match=r"nothing usable for MultiReasonSeg.*1 × record without questions"):
        build_reader("MultiReasonSeg", tmp_path, "train")
    data_sets.write_vqa(tmp_path, [])
    with pytest.raises(DataError, match=r"nothing usable for llava_instruct_150k.*it is empty"):
        build_reader("llava_instruct_150k", tmp_path, "train")

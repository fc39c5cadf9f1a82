"""The written scene data: official formats, exact masks, exact shares, nothing held out in what is trained on."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_rle

from demo.scenes import (
    HELD_OUT_SPEC,
    SceneDataSettings,
    SceneSettings,
    check_difficulty,
    check_no_leak,
    draw_scene,
    named_shape,
    read_scenes,
    scene_masks,
    write_scene_data,
)
from model.structures import SEG_MARKER
from utils.data.errors import DataError
from utils.data.readers.registry import build_eval_reader
from utils.data.samples import TEXT, Sample

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = SceneDataSettings(train=30, heldout=60, questions=100)
IMAGES = "refer_seg/images/mscoco/images/train2014"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scene_data(root, SETTINGS)
    return root


@pytest.fixture
def own_copy(data_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_root, tmp_path / "data"))


def read_json(root: Path, path: str) -> Any:
    return json.loads((root / path).read_text(encoding="utf-8"))


def held_out_samples(root: Path) -> list[Sample]:
    return list(build_eval_reader(HELD_OUT_SPEC, root))


def test_images_and_annotations_show_the_scenes(data_root: Path) -> None:
    instances = read_json(data_root, "refer_seg/refcoco/instances.json")
    assert instances == read_json(data_root, "refer_seg/grefcoco/instances.json")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    annotations: dict[int, list[dict[str, Any]]] = {}
    for annotation in instances["annotations"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    records = read_scenes(data_root)
    assert Counter(record.split for record in records) == {"train": 30, "val": 60}
    for image, record in zip(instances["images"], records, strict=True):
        pixels = cv2.imread(str(data_root / IMAGES / image["file_name"]))[:, :, ::-1]
        assert image["file_name"] == record.file_name
        assert np.array_equal(pixels, draw_scene(record.scene)), "PNG is not lossless"
        found = annotations[image["id"]]
        assert [names[a["category_id"]] for a in found] == [s.name for s in record.scene.shapes]
        decoded = [coco_rle.decode(a["segmentation"]) for a in found]
        assert np.array_equal(decoded, scene_masks(record.scene))
        assert [a["area"] for a in found] == [mask.sum() for mask in decoded]


def test_refs_have_the_official_fields(data_root: Path) -> None:
    content = (data_root / "refer_seg/refcoco/refs(unc).p").read_bytes()
    assert content[:2] == b"\x80\x02", "protocol 2"
    refs, grefs = pickle.loads(content), read_json(data_root, "refer_seg/grefcoco/grefs(unc).json")
    fields = {"sent_ids", "file_name", "ann_id", "ref_id", "image_id", "split", "sentences", "category_id"}
    assert {frozenset(ref) for ref in refs} == {frozenset(fields)}
    assert {frozenset(ref) for ref in grefs} == {frozenset(fields | {"no_target"})}
    sentences = [s for ref in refs for s in ref["sentences"]]
    assert {frozenset(s) for s in sentences} == {frozenset({"tokens", "raw", "sent_id", "sent"})}
    assert all(s["sent"].split() == s["tokens"] for s in sentences)
    for ref in grefs:
        assert (ref["no_target"] == (ref["ann_id"] == [-1]) and len(ref["ann_id"]) != 1) or ref["ann_id"] == [-1]
        assert all(s["exist"] is not ref["no_target"] for s in ref["sentences"])
    for one_set in (refs, grefs):
        assert len({ref["ref_id"] for ref in one_set}) == len(one_set)
        assert {ref["split"] for ref in one_set} == {"train", "val"}


def test_muse_answers_mark_each_instance_after_its_name(data_root: Path) -> None:
    for split in ("train", "val"):
        for record in read_json(data_root, f"muse/muse_{split}.json"):
            assert len(record["questions"]) == len(record["answers"]) == len(record["text_answers"]) > 0
            for instances, text in zip(record["answers"], record["text_answers"], strict=True):
                named = [named_shape(words) for words in text.split(SEG_MARKER)[:-1]]
                assert named == [instance["category_name"] for instance in instances]


def test_conversations_in_words_are_about_training_images(data_root: Path) -> None:
    entries = read_json(data_root, "llava_dataset/llava_instruct_150k.json")
    assert len(entries) == 30 * 5, "five conversations for each image"
    assert {entry["image"] for entry in entries} == {f"{number:012d}.png" for number in range(1, 31)}
    for entry in entries:
        said = entry["conversations"]
        assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2) and 2 <= len(said) <= 6, (
            "one to three turns"
        )
        assert [turn["value"].count("<image>") for turn in said] == [1] + [0] * (len(said) - 1)
        words = (data_root / "coco/train2017" / entry["image"]).read_bytes()
        assert words == (data_root / IMAGES / f"COCO_train2014_{entry['image']}").read_bytes()


def test_held_out_images_are_talked_about_in_words(data_root: Path) -> None:
    """Two turns about each, in words alone; none of the images is trained on."""
    samples = list(build_eval_reader("custom|talk|val", data_root))
    held_out = [record for record in read_scenes(data_root) if record.split == "val"]
    assert [Path(sample.image_path).name for sample in samples] == [record.file_name for record in held_out][:150]
    for sample in samples:
        (turns,) = sample.conversations
        assert len(turns) == 2 and all(turn.kind == TEXT and SEG_MARKER not in turn.answer for turn in turns)
        assert Path(sample.image_path).read_bytes() == (data_root / IMAGES / Path(sample.image_path).name).read_bytes()


def test_held_out_questions_through_the_readers(data_root: Path) -> None:
    samples = held_out_samples(data_root)
    turns = [turn for sample in samples for conversation in sample.conversations for turn in conversation]
    assert Counter(turn.kind for turn in turns) == {"direct": 35, "several": 27, "reasoning": 28, "no_target": 10}
    found = check_difficulty(data_root, samples, least_questions=100)
    assert found.n == 100 and set(found.shapes) == {3, 4, 5, 6}
    assert max(found.baselines.values()) < 0.40
    by_file = {record.file_name: record.scene for record in read_scenes(data_root)}
    for sample in samples:
        masks = scene_masks(by_file[Path(sample.image_path).name])
        for turn in (turn for conversation in sample.conversations for turn in conversation):
            places = [next(i for i, m in enumerate(masks) if np.array_equal(m, t.decode())) for t in turn.targets]
            assert places == sorted(places), "targets are not in reading order"


def test_easy_questions_are_refused(data_root: Path) -> None:
    samples = held_out_samples(data_root)
    with pytest.raises(DataError, match="expected at least 1000"):
        check_difficulty(data_root, samples)
    direct = [s for s in samples if s.dataset == "refcoco"]
    with pytest.raises(DataError, match=r"100.0% of the held-out questions are direct"):
        check_difficulty(data_root, direct, least_questions=1)
    turn = direct[0].conversations[0][0]
    blank = replace(turn, targets=(replace(turn.targets[0], decode=lambda: np.zeros((112, 112), dtype=np.uint8)),))
    with pytest.raises(DataError, match="none of the shapes"):
        check_difficulty(data_root, [replace(direct[0], conversations=((blank,),))], least_questions=1)


def test_clean_data_passes_the_leak_check(data_root: Path) -> None:
    found = check_no_leak(data_root)
    assert found.images_trained_on == 30 and 40 <= found.images_held_out <= 60


def test_a_held_out_image_that_is_trained_on_is_named(own_copy: Path) -> None:
    path = own_copy / "muse/muse_train.json"
    culprit = read_json(own_copy, "muse/muse_val.json")[0]
    path.write_text(json.dumps([*read_json(own_copy, "muse/muse_train.json"), culprit]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"{culprit['file_name']} is trained on"):
        check_no_leak(own_copy)


def test_a_copied_image_is_named(own_copy: Path) -> None:
    held_out = own_copy / IMAGES / read_json(own_copy, "muse/muse_val.json")[0]["file_name"]
    twin = own_copy / "coco/train2017/000000000007.png"
    twin.unlink()
    shutil.copyfile(held_out, twin)
    with pytest.raises(DataError, match=rf"{held_out.name} is the training image .*000000000007.png"):
        check_no_leak(own_copy)


def test_a_repeated_scene_is_named(own_copy: Path) -> None:
    manifest = read_json(own_copy, "scenes.json")
    manifest["scenes"][40] |= {k: manifest["scenes"][3][k] for k in ("scene", "scene_key")}
    (own_copy / "scenes.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match=r"000000000041.png and COCO_train2014_000000000004.png show the same scene"):
        check_no_leak(own_copy)


def test_broken_manifests_are_refused(own_copy: Path) -> None:
    manifest = read_json(own_copy, "scenes.json")
    manifest["scenes"][0]["scene_key"] = "another"
    (own_copy / "scenes.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match="make the data again"):
        read_scenes(own_copy)
    (own_copy / "scenes.json").unlink()
    with pytest.raises(DataError, match="No such file"):
        read_scenes(own_copy)


def test_the_same_seed_gives_the_same_files(data_root: Path, tmp_path: Path) -> None:
    def digests(root: Path) -> dict[str, str]:
        files = (path for path in root.rglob("*") if path.is_file())
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    write_scene_data(tmp_path / "again", SETTINGS)
    write_scene_data(tmp_path / "other", replace(SETTINGS, seed=1))
    first = digests(data_root)
    assert digests(tmp_path / "again") == first != digests(tmp_path / "other")


def test_old_data_is_not_mixed_with_new(data_root: Path) -> None:
    with pytest.raises(FileExistsError, match="is there already"):
        write_scene_data(data_root, SETTINGS)


@pytest.mark.parametrize("side", [56, 224])
def test_other_sizes(side: int, tmp_path: Path) -> None:
    settings = SceneDataSettings(train=2, heldout=20, questions=10, scene=SceneSettings(side), conversations=1)
    summary = write_scene_data(tmp_path, settings)
    assert sum(n for name, n in summary["questions_by_kind"].items() if name.startswith("val")) == 10
    record = read_scenes(tmp_path)[0]
    assert cv2.imread(str(tmp_path / IMAGES / record.file_name)).shape == (side, side, 3)


def test_command_line(tmp_path: Path, child_env: dict[str, str]) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "demo.make_scenes", "--out", str(tmp_path / "data"), *arguments]
        return subprocess.run(command, env=child_env, capture_output=True, text=True, timeout=60)

    small = ("--train", "2", "--heldout", "20", "--questions", "10", "--size", "64")
    done = run(*small)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scene"]["side"] == 64
    again = run(*small)
    assert again.returncode == 1 and "is there already" in again.stderr and "Traceback" not in again.stderr

"""Scenes and their questions on disk, in the official formats of the data sets they imitate, under one data root:

    refer_seg/images/mscoco/images/train2014/COCO_train2014_%012d.png   all images
    refer_seg/refcoco/{instances.json,refs(unc).p}                      direct questions, splits train and val
    refer_seg/grefcoco/{instances.json,grefs(unc).json}                 several targets and none, splits train and val
    muse/{muse_train.json,muse_val.json}                                reasoning
    coco/train2017/%012d.png, llava_dataset/llava_instruct_150k.json    conversations in words, on the training images
    custom/talk/val/{images/,annotations.jsonl}                         the same on held-out images
    scenes.json                                                         ours: which scene each image shows

Held-out images appear only in the val splits and in muse_val.json. Masks are run-length codes, exact to the pixel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from demo.scenes.conversations import Turn, make_conversation
from demo.scenes.drawing import draw_scene, scene_masks
from demo.scenes.manifest import SCENES_FILE, SceneRecord, hash_image
from demo.scenes.planning import (
    HELD_OUT,
    TRAIN,
    PlacedScene,
    Question,
    SceneDataSettings,
    by_kind,
    place_scenes,
    plan_held_out,
    plan_training,
)
from demo.scenes.questions import Ask, Phrased
from demo.scenes.words import category_names

IMAGE_FOLDER = Path("refer_seg/images/mscoco/images/train2014")
WORDS_IMAGE_FOLDER = Path("coco/train2017")
REFCOCO_REFS = Path("refer_seg/refcoco/refs(unc).p")
GREFCOCO_REFS = Path("refer_seg/grefcoco/grefs(unc).json")
INSTANCES = Path("instances.json")
MUSE_FILES = {TRAIN: Path("muse/muse_train.json"), HELD_OUT: Path("muse/muse_val.json")}
WORDS_FILE = Path("llava_dataset/llava_instruct_150k.json")
TALK_FILE, TALK_IMAGE_FOLDER = Path("custom/talk/val/annotations.jsonl"), Path("custom/talk/val/images")
_FILES = (SCENES_FILE, REFCOCO_REFS, GREFCOCO_REFS, *MUSE_FILES.values(), WORDS_FILE, TALK_FILE)
# How many held-out images are talked about, and in how many turns.
_TALKS, _TALK_TURNS = 150, 2
# How the held-out questions are named on a command line (--val_dataset).
HELD_OUT_SPEC = "refcoco|unc|val||grefcoco|unc|val||MultiReasonSeg|val"
_PNG_LEVEL = 1  # of 9: fast

Record = dict[str, Any]
Progress = Callable[[Iterable[PlacedScene], int, str], Iterable[PlacedScene]]


def image_name(number: int) -> str:
    """File name of an image in IMAGE_FOLDER."""
    return f"COCO_train2014_{number:012d}.png"


def words_image_name(number: int) -> str:
    """File name of the same image in WORDS_IMAGE_FOLDER."""
    return f"{number:012d}.png"


class _Files:
    """Collects the records of all files, scene by scene, and writes them at the end.

    Records are kept as JSON text: as objects, the millions of them would keep the garbage collector busy.
    """

    def __init__(self) -> None:
        self.images: list[str] = []
        self.annotations: list[str] = []
        self.refs: list[Record] = []
        self.grefs: list[str] = []
        self.muse: dict[str, list[str]] = {split: [] for split in MUSE_FILES}
        self.words: list[str] = []
        self.talk: list[str] = []
        self.scenes: list[str] = []
        self._sentences = 0

    def add_scene(self, placed: PlacedScene, image: NDArray[np.uint8]) -> list[Record]:
        """Enter an image and the annotations of its shapes, in reading order; returns the latter."""
        name, side = image_name(placed.number), placed.scene.side
        self.images.append(json.dumps({"id": placed.number, "file_name": name, "height": side, "width": side}))
        annotations = _annotations(placed, len(self.annotations) + 1)
        self.annotations += map(json.dumps, annotations)
        record = SceneRecord(name, placed.split, hash_image(image), placed.scene)
        self.scenes.append(json.dumps(record.as_dict()))
        return annotations

    def add_questions(self, placed: PlacedScene, annotations: list[Record], questions: list[Question]) -> None:
        """Enter the questions about a scene in the files that hold their kind."""
        sorted_out = by_kind(questions)
        for ask, wordings in _wordings(sorted_out["direct"]).items():
            target = annotations[ask.targets[0]]
            targets = {"ann_id": target["id"], "category_id": target["category_id"]}
            self.refs.append(self._ref(placed, len(self.refs), targets, wordings))
        for ask, wordings in _wordings(sorted_out["several"] + sorted_out["no_target"]).items():
            self.grefs.append(json.dumps(self._generalised_ref(placed, annotations, ask, wordings)))
        if sorted_out["reasoning"]:
            record = _muse_record(placed, annotations, sorted_out["reasoning"])
            self.muse[placed.split].append(json.dumps(record))

    def _ref(self, placed: PlacedScene, ref_id: int, targets: Record, wordings: list[str]) -> Record:
        numbers = range(self._sentences, self._sentences + len(wordings))
        self._sentences += len(wordings)
        sentences = [
            {"sent_id": number, "sent": words, "raw": words, "tokens": words.split()}
            for number, words in zip(numbers, wordings, strict=True)
        ]
        where = {"image_id": placed.number, "split": placed.split, "file_name": image_name(placed.number)}
        return {"ref_id": ref_id, **targets, **where, "sentences": sentences, "sent_ids": list(numbers)}

    def _generalised_ref(self, placed: PlacedScene, annotations: list[Record], ask: Ask, wordings: list[str]) -> Record:
        targets = {
            "no_target": not ask.targets,
            "ann_id": [annotations[i]["id"] for i in ask.targets] or [-1],
            "category_id": [annotations[i]["category_id"] for i in ask.targets] or [-1],
        }
        ref = self._ref(placed, len(self.grefs), targets, wordings)
        for sentence in ref["sentences"]:
            sentence["exist"] = bool(ask.targets)
        return ref

    def add_words(self, placed: PlacedScene, conversations: list[list[Turn]]) -> None:
        """Enter conversations in words."""
        for i, turns in enumerate(conversations):
            said = _messages(turns)
            said[0]["value"] = f"<image>\n{said[0]['value']}"
            entry = {
                "id": f"{placed.number:012d}_{i}",
                "image": words_image_name(placed.number),
                "conversations": said,
            }
            self.words.append(json.dumps(entry))

    def add_talk(self, placed: PlacedScene, turns: list[Turn]) -> None:
        """Enter a conversation in words about a held-out image."""
        entry = {"image": image_name(placed.number), "conversations": _messages(turns), "masks": []}
        self.talk.append(json.dumps(entry))

    def write(self, root: Path, settings: SceneDataSettings) -> None:
        """Write everything but the images."""
        categories = [
            {"id": i, "name": name, "supercategory": name.split()[1]}
            for i, name in enumerate(category_names(), start=1)
        ]
        instances = _json_object(
            info=json.dumps({"description": f"drawn scenes of coloured shapes, seed {settings.seed}"}),
            images=_json_list(self.images),
            annotations=_json_list(self.annotations),
            categories=json.dumps(categories),
            licenses="[]",
        )
        for refs in (REFCOCO_REFS, GREFCOCO_REFS):
            _write_text(root / refs.parent / INSTANCES, instances)
        (root / REFCOCO_REFS).write_bytes(pickle.dumps(self.refs, protocol=2))
        _write_text(root / GREFCOCO_REFS, _json_list(self.grefs))
        for split, path in MUSE_FILES.items():
            _write_text(root / path, _json_list(self.muse[split]))
        _write_text(root / WORDS_FILE, _json_list(self.words))
        _write_text(root / TALK_FILE, "".join(f"{line}\n" for line in self.talk))
        made_with = json.dumps(dataclasses.asdict(settings))
        _write_text(root / SCENES_FILE, _json_object(settings=made_with, scenes=_json_list(self.scenes)))


def _annotations(placed: PlacedScene, first_id: int) -> list[Record]:
    """COCO annotations of all shapes of a scene, in reading order."""
    from pycocotools import mask as coco_rle

    codes = coco_rle.encode(np.asfortranarray(scene_masks(placed.scene).transpose(1, 2, 0)))
    areas, boxes = coco_rle.area(codes).tolist(), coco_rle.toBbox(codes).tolist()
    numbers = {name: i for i, name in enumerate(category_names(), start=1)}
    return [
        {
            "id": first_id + i,
            "image_id": placed.number,
            "category_id": numbers[shape.name],
            "iscrowd": 0,
            "area": areas[i],
            "bbox": boxes[i],
            "segmentation": {"size": codes[i]["size"], "counts": codes[i]["counts"].decode("ascii")},
        }
        for i, shape in enumerate(placed.scene.shapes)
    ]


def _wordings(questions: list[Question]) -> dict[Ask, list[str]]:
    """Each fact with the different ways in which it is asked for."""
    wordings: dict[Ask, list[str]] = {}
    for ask, phrased in questions:
        if phrased.question not in wordings.setdefault(ask, []):
            wordings[ask].append(phrased.question)
    return wordings


def _muse_record(placed: PlacedScene, annotations: list[Record], questions: list[tuple[Ask, Phrased]]) -> Record:
    side, shapes = placed.scene.side, placed.scene.shapes
    instances = [
        {name: annotation[name] for name in ("id", "segmentation", "bbox", "category_id")}
        | {"category_name": shape.name, "rephrased_name": shape.name}
        for annotation, shape in zip(annotations, shapes, strict=True)
    ]
    return {
        "id": placed.number,
        "file_name": image_name(placed.number),
        "height": side,
        "width": side,
        "ann_list": annotations,
        "questions": [phrased.question for _, phrased in questions],
        "answers": [[instances[i] for i in ask.targets] for ask, _ in questions],
        "text_answers": [phrased.answer for _, phrased in questions],
    }


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    """A conversation as LLaVA's files have it."""
    return [
        {"from": speaker, "value": text} for turn in turns for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]


def _json_list(items: list[str]) -> str:
    """A list of values that are JSON already."""
    return f"[{', '.join(items)}]"


def _json_object(**fields: str) -> str:
    """An object whose values are JSON already."""
    return f"{{{', '.join(f'{json.dumps(name)}: {value}' for name, value in fields.items())}}}"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_image(path: Path, image: NDArray[np.uint8]) -> None:
    done, encoded = cv2.imencode(".png", image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])
    if not done:
        raise OSError(f"{path}: an image of shape {image.shape} could not be encoded as PNG")
    path.write_bytes(encoded.tobytes())


def _link(source: Path, target: Path) -> None:
    """The same image under a second path: a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _no_progress(scenes: Iterable[PlacedScene], total: int, what: str) -> Iterable[PlacedScene]:
    return scenes


def _refuse_old_data(root: Path) -> None:
    """FileExistsError when anything that is about to be written is there already."""
    for path in (*_FILES, IMAGE_FOLDER, WORDS_IMAGE_FOLDER, TALK_IMAGE_FOLDER):
        if (root / path).exists():
            raise FileExistsError(f"{root / path} is there already: name a new folder, or remove the old data first")


def write_scene_data(
    root: str | Path, settings: SceneDataSettings, progress: Progress = _no_progress
) -> dict[str, Any]:
    """Draw the scenes and write every file under `root`; returns a summary: settings, and facts asked for by kind.

    `progress(scenes, total, what)` may wrap a loop. FileExistsError when `root` holds such data already; ValueError for
    settings that cannot be met; OSError where a file cannot be written.
    """
    root = Path(root)
    _refuse_old_data(root)
    total = settings.train + settings.heldout
    scenes = list(progress(place_scenes(settings), total, "scenes"))
    held_out = [placed for placed in scenes if placed.split == HELD_OUT]
    asked = dict(zip(held_out, plan_held_out([placed.scene for placed in held_out], settings), strict=True))
    for folder in {path.parent for path in _FILES} | {IMAGE_FOLDER, WORDS_IMAGE_FOLDER, TALK_IMAGE_FOLDER}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    files, counts = _Files(), Counter[str]()
    for placed in progress(scenes, total, "images and questions"):
        image = draw_scene(placed.scene)
        path = root / IMAGE_FOLDER / image_name(placed.number)
        _write_image(path, image)
        annotations = files.add_scene(placed, image)
        if placed.split == TRAIN:
            _link(path, root / WORDS_IMAGE_FOLDER / words_image_name(placed.number))
            questions, conversations = plan_training(placed, settings)
            files.add_words(placed, conversations)
        else:
            questions = asked[placed]
            if len(files.talk) < _TALKS:
                _link(path, root / TALK_IMAGE_FOLDER / image_name(placed.number))
                rng = random.Random(f"talk/{settings.seed}/{placed.number}")
                files.add_talk(placed, make_conversation(placed.scene, rng, _TALK_TURNS, settings.more_phrasings))
        files.add_questions(placed, annotations, questions)
        counts.update(f"{placed.split}: {ask.kind} / {ask.family}" for ask, _ in questions)
    files.write(root, settings)
    return {"root": str(root), **dataclasses.asdict(settings), "questions_by_kind": dict(sorted(counts.items()))}

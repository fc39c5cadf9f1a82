"""Scenes and their questions on disk, in the official formats of the data sets they imitate, under one data root:

    refer_seg/images/mscoco/images/train2014/COCO_train2014_%012d.png   all pictures
    refer_seg/refcoco/{instances.json,refs(unc).p}                      direct questions, splits train and val
    refer_seg/grefcoco/{instances.json,grefs(unc).json}                 several targets and none, splits train and val
    muse/{muse_train.json,muse_val.json}                                reasoning
    coco/train2017/%012d.png, llava_dataset/llava_instruct_150k.json    conversations in words about the training pictures
    scenes.json                                                         ours: which scene each picture shows; written last

Held-out pictures appear only in the val splits and in muse_val.json. Masks are compressed RLE, exact to the pixel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .conversations import DEFAULT_GRID, make_conversation
from .drawing import Background, Scene, Shape, draw_scene, scene_masks
from .questions import FAMILIES, Ask, Phrased, find_asks
from .sampling import SceneSettings, sample_scenes
from .words import category_names

PICTURE_FOLDER = Path("refer_seg/images/mscoco/images/train2014")
WORDS_PICTURE_FOLDER = Path("coco/train2017")
REFCOCO_REFS = Path("refer_seg/refcoco/refs(unc).p")
GREFCOCO_REFS = Path("refer_seg/grefcoco/grefs(unc).json")
MUSE_FILES = {"train": Path("muse/muse_train.json"), "val": Path("muse/muse_val.json")}
WORDS_FILE = Path("llava_dataset/llava_instruct_150k.json")
SCENES_FILE = Path("scenes.json")
# How `--val_dataset` names the held-out questions.
HELD_OUT_SPEC = "refcoco|unc|val||grefcoco|unc|val||MultiReasonSeg|val"
# Shares of the held-out questions by kind.
KIND_SHARES = {"direct": 0.35, "several": 0.27, "reasoning": 0.28, "no_target": 0.10}
_FAMILY_SHARES = {
    "direct": {"name": 1.0},
    "several": {"form": 0.3, "colour": 0.3, "pair": 0.3, "double": 0.1},
    "reasoning": {"relation": 0.25, "size": 0.25, "count": 0.25, "exclusion": 0.25},
    "no_target": {"absent_name": 0.4, "absent_half": 0.3, "absent_colour": 0.15, "absent_form": 0.15},
}
# Facts asked for about each training picture, and wordings of each in the refer files.
_TRAIN_ASKS = {"direct": 4, "several": 3, "reasoning": 6, "no_target": 2}
_TRAIN_WORDINGS = 2
_PNG_LEVEL = 1

Question = tuple[Ask, Phrased]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class SceneDataSettings:
    """How much is written. train, heldout: numbers of scenes; questions: number of held-out questions; seed: everything follows
    from it; conversations, turns: conversations in words per training picture and least and most turns of each; grid: rows
    (= columns) of the grid that places are given on."""

    train: int = 6000
    heldout: int = 600
    questions: int = 1000
    seed: int = 0
    scene: SceneSettings = dataclasses.field(default_factory=SceneSettings)
    conversations: int = 2
    turns: tuple[int, int] = (4, 6)
    grid: int = DEFAULT_GRID

    def __post_init__(self) -> None:
        for name in ("train", "heldout", "questions", "grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")


@dataclass(frozen=True, slots=True)
class PlacedScene:
    """A scene with its number (the image id), its split and its picture's file name in PICTURE_FOLDER."""

    number: int
    split: str
    scene: Scene

    @property
    def file_name(self) -> str:
        return f"COCO_train2014_{self.number:012d}.png"

    @property
    def words_file_name(self) -> str:
        return f"{self.number:012d}.png"


def split_exactly(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `total`, as near to the shares as can be (largest remainder)."""
    exact = {name: total * share for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def training_questions(scene: Scene, rng: random.Random) -> dict[str, list[Ask]]:
    """What is asked about a training picture: up to _TRAIN_ASKS facts of each kind, families taken in turn, in random order."""
    chosen: dict[str, list[Ask]] = {}
    for kind, families in find_asks(scene).items():
        piles = [rng.sample(asks, len(asks)) for asks in families.values()]
        rng.shuffle(piles)
        picked: list[Ask] = []
        while len(picked) < _TRAIN_ASKS[kind] and any(piles):
            picked += [pile.pop() for pile in piles if pile]
        chosen[kind] = picked[: _TRAIN_ASKS[kind]]
    return chosen


def held_out_questions(scenes: list[Scene], count: int, rng: random.Random) -> list[list[Question]]:
    """Exactly `count` questions, in the shares of KIND_SHARES and their families, spread over the scenes; no question twice about a
    scene. ValueError when there are too few scenes for them."""
    found = [find_asks(scene) for scene in scenes]
    chosen: list[list[Question]] = [[] for _ in scenes]
    for kind, kind_count in split_exactly(count, KIND_SHARES).items():
        for family, needed in split_exactly(kind_count, _FAMILY_SHARES[kind]).items():
            piles = {i: rng.sample(asks[kind][family], len(asks[kind][family])) for i, asks in enumerate(found)}
            while needed:
                open_scenes = [i for i, pile in piles.items() if pile]
                if not open_scenes:
                    raise ValueError(
                        f"{len(scenes)} held-out scenes give too few {kind} questions about {family}: {needed} short of "
                        f"{count} questions in all; ask for more held-out scenes or fewer questions"
                    )
                rng.shuffle(open_scenes)
                open_scenes.sort(key=lambda i: len(chosen[i]))
                for i in open_scenes[:needed]:
                    ask = piles[i].pop()
                    chosen[i].append((ask, ask.phrase(rng, scenes[i])))
                needed -= min(needed, len(open_scenes))
    return chosen


def _annotations(placed: PlacedScene, masks_NHW: NDArray[np.uint8], first_id: int) -> list[dict[str, Any]]:
    """COCO annotations of all shapes of a scene, in reading order, with exact RLE."""
    from pycocotools import mask as mask_utils

    codes = mask_utils.encode(np.asfortranarray(masks_NHW.transpose(1, 2, 0)))
    areas, boxes = mask_utils.area(codes).tolist(), mask_utils.toBbox(codes).tolist()
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


def _sentences(wordings: list[str], first_id: int) -> list[dict[str, Any]]:
    return [{"sent_id": first_id + i, "sent": s, "raw": s, "tokens": s.split()} for i, s in enumerate(wordings)]


class _Files:
    """Collects the records of all files, scene by scene, and writes them at the end."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.grefs: list[dict[str, Any]] = []
        self.muse: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        self.words: list[dict[str, Any]] = []
        self.scenes: list[dict[str, Any]] = []
        self._sentence_id = 0

    def add_scene(self, placed: PlacedScene, masks_NHW: NDArray[np.uint8], picture_hash: str) -> list[dict[str, Any]]:
        """Enter the picture and its annotations; returns the latter."""
        side = placed.scene.side
        self.images.append({"id": placed.number, "file_name": placed.file_name, "height": side, "width": side})
        annotations = _annotations(placed, masks_NHW, len(self.annotations) + 1)
        self.annotations += annotations
        record = {
            "number": placed.number,
            "split": placed.split,
            "file_name": placed.file_name,
            "key": placed.scene.key,
        }
        self.scenes.append(record | {"picture": picture_hash, "scene": dataclasses.asdict(placed.scene)})
        return annotations

    def _sentence_fields(self, wordings: list[str]) -> dict[str, Any]:
        sentences = _sentences(wordings, self._sentence_id)
        self._sentence_id += len(sentences)
        return {"sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences]}

    def add_direct(self, placed: PlacedScene, target: dict[str, Any], wordings: list[str]) -> None:
        ref = {
            "ref_id": len(self.refs),
            "ann_id": target["id"],
            "image_id": placed.number,
            "category_id": target["category_id"],
        }
        self.refs.append(ref | {"split": placed.split, "file_name": placed.file_name} | self._sentence_fields(wordings))

    def add_generalised(self, placed: PlacedScene, targets: list[dict[str, Any]], wordings: list[str]) -> None:
        fields = self._sentence_fields(wordings)
        for sentence in fields["sentences"]:
            sentence["exist"] = bool(targets)
        ref = {
            "ref_id": len(self.grefs),
            "no_target": not targets,
            "ann_id": [t["id"] for t in targets] or [-1],
            "category_id": [t["category_id"] for t in targets] or [-1],
            "image_id": placed.number,
            "split": placed.split,
            "file_name": placed.file_name,
        }
        self.grefs.append(ref | fields)

    def add_reasoning(self, placed: PlacedScene, annotations: list[dict[str, Any]], questions: list[Question]) -> None:
        if not questions:
            return
        side, shapes = placed.scene.side, placed.scene.shapes
        instance_fields = ("id", "segmentation", "bbox", "category_id")
        instances = [
            {name: a[name] for name in instance_fields} | {"category_name": s.name, "rephrased_name": s.name}
            for a, s in zip(annotations, shapes, strict=True)
        ]
        record = {
            "id": placed.number,
            "file_name": placed.file_name,
            "height": side,
            "width": side,
            "ann_list": annotations,
        }
        record |= {
            "questions": [phrased.question for _, phrased in questions],
            "answers": [[instances[i] for i in ask.targets] for ask, _ in questions],
            "text_answers": [phrased.answer for _, phrased in questions],
        }
        self.muse[placed.split].append(record)

    def add_words(self, placed: PlacedScene, conversations: list[list[tuple[str, str]]]) -> None:
        for i, turns in enumerate(conversations):
            entries = []
            for question, answer in turns:
                value = f"<image>\n{question}" if not entries else question
                entries += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
            entry = {"id": f"{placed.number:012d}_{i}", "image": placed.words_file_name, "conversations": entries}
            self.words.append(entry)

    def write(self, root: Path, settings: SceneDataSettings) -> None:
        info = {"description": f"drawn scenes of coloured shapes, seed {settings.seed}"}
        categories = [
            {"id": i, "name": name, "supercategory": name.split()[1]}
            for i, name in enumerate(category_names(), start=1)
        ]
        instances = json.dumps(
            {
                "info": info,
                "images": self.images,
                "annotations": self.annotations,
                "categories": categories,
                "licenses": [],
            }
        )
        _write_text(root / REFCOCO_REFS.parent / "instances.json", instances)
        _write_text(root / GREFCOCO_REFS.parent / "instances.json", instances)
        (root / REFCOCO_REFS).write_bytes(pickle.dumps(self.refs, protocol=2))
        _write_text(root / GREFCOCO_REFS, json.dumps(self.grefs))
        for split, path in MUSE_FILES.items():
            _write_text(root / path, json.dumps(self.muse[split]))
        _write_text(root / WORDS_FILE, json.dumps(self.words))
        _write_text(root / SCENES_FILE, json.dumps({"settings": dataclasses.asdict(settings), "scenes": self.scenes}))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """The same picture under a second path: a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def picture_hash(picture: NDArray[np.uint8]) -> str:
    """Hash of the pixels of a picture (H, W, 3)."""
    return hashlib.sha256(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()[:32]


def _write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """PNG, lossless. OSError where it cannot be written."""
    done, encoded = cv2.imencode(".png", picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])
    if not done:
        raise OSError(f"{path}: the picture of shape {picture.shape} could not be encoded as PNG")
    path.write_bytes(encoded.tobytes())


def _place_scenes(settings: SceneDataSettings) -> Iterator[PlacedScene]:
    """All scenes: the held-out ones last. No scene comes twice."""
    taken: set[str] = set()
    number = 0
    for split, count in (("train", settings.train), ("val", settings.heldout)):
        source = sample_scenes(settings.scene, settings.seed, split, taken)
        for _ in range(count):
            number += 1
            yield PlacedScene(number, split, next(source))


def _plan_training(placed: PlacedScene, settings: SceneDataSettings) -> dict[str, list[tuple[Ask, list[Phrased]]]]:
    """Facts and wordings of a training picture by kind: several wordings of each, but one for reasoning."""
    rng = random.Random(f"questions/{settings.seed}/{placed.number}")
    plan = {}
    for kind, asks in training_questions(placed.scene, rng).items():
        wordings = 1 if kind == "reasoning" else _TRAIN_WORDINGS
        plan[kind] = [(ask, [ask.phrase(rng, placed.scene) for _ in range(wordings)]) for ask in asks]
    return plan


def _enter(
    files: _Files,
    placed: PlacedScene,
    annotations: list[dict[str, Any]],
    plan: dict[str, list[tuple[Ask, list[Phrased]]]],
) -> None:
    """Enter the questions about one scene in the files they belong to."""
    for ask, phrased in plan["direct"]:
        files.add_direct(placed, annotations[ask.targets[0]], _distinct(p.question for p in phrased))
    for ask, phrased in plan["several"] + plan["no_target"]:
        files.add_generalised(placed, [annotations[i] for i in ask.targets], _distinct(p.question for p in phrased))
    files.add_reasoning(placed, annotations, [(ask, p) for ask, phrased in plan["reasoning"] for p in phrased])


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _no_progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return items


def write_scene_data(
    root: str | Path, settings: SceneDataSettings, progress: Progress = _no_progress
) -> dict[str, Any]:
    """Draw the scenes and write every file under `root`; returns what is there (see `describe`).

    `progress(items, total, what)` may wrap a loop. FileExistsError when `root` holds data already; ValueError for settings that
    cannot be met; OSError where a file cannot be written.
    """
    root = Path(root)
    for path in (SCENES_FILE, Path("refer_seg"), Path("muse"), Path("llava_dataset"), Path("coco")):
        if (root / path).exists():
            raise FileExistsError(f"{root / path} is there already: name a new folder, or remove the old data first")
    scenes = list(progress(_place_scenes(settings), settings.train + settings.heldout, "scenes"))
    held_out = [p for p in scenes if p.split == "val"]
    asked = held_out_questions(
        [p.scene for p in held_out], settings.questions, random.Random(f"held-out/{settings.seed}")
    )
    for folder in (PICTURE_FOLDER, WORDS_PICTURE_FOLDER, REFCOCO_REFS.parent, GREFCOCO_REFS.parent):
        (root / folder).mkdir(parents=True, exist_ok=True)
    files, families = _Files(), Counter[str]()
    for placed in progress(scenes, len(scenes), "pictures and questions"):
        picture = draw_scene(placed.scene)
        path = root / PICTURE_FOLDER / placed.file_name
        _write_picture(path, picture)
        annotations = files.add_scene(placed, scene_masks(placed.scene), picture_hash(picture))
        if placed.split == "train":
            plan = _plan_training(placed, settings)
            _link(path, root / WORDS_PICTURE_FOLDER / placed.words_file_name)
            rng = random.Random(f"words/{settings.seed}/{placed.number}")
            files.add_words(
                placed,
                [
                    make_conversation(placed.scene, rng, rng.randint(*settings.turns), settings.grid)
                    for _ in range(settings.conversations)
                ],
            )
        else:
            questions = asked[placed.number - settings.train - 1]
            plan = {kind: [(ask, [p]) for ask, p in questions if ask.kind == kind] for kind in FAMILIES}
        families.update(f"{placed.split}/{kind}/{ask.family}" for kind, asks in plan.items() for ask, _ in asks)
        _enter(files, placed, annotations, plan)
    files.write(root, settings)
    return describe(root, settings, families, len(files.words))


def describe(root: Path, settings: SceneDataSettings, families: Counter[str], conversations: int) -> dict[str, Any]:
    """Summary of a written data set: numbers of scenes, conversations in words, and facts asked for by split/kind/family."""
    numbers = {
        "train_scenes": settings.train,
        "held_out_scenes": settings.heldout,
        "conversations_in_words": conversations,
    }
    return {"root": str(root), "side": settings.scene.side, **numbers, "asked": dict(sorted(families.items()))}


@dataclass(frozen=True, slots=True)
class SceneRecord:
    """One entry of scenes.json: the file name of the picture, its split, hashes of scene and picture, and the scene."""

    file_name: str
    split: str
    key: str
    picture: str
    scene: Scene


def read_scenes(root: str | Path) -> list[SceneRecord]:
    """The scenes of a data root that `write_scene_data` wrote. ValueError where the file is missing or cannot be understood."""
    path = Path(root) / SCENES_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["scenes"]
        return [_scene_record(entry) for entry in entries]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: expected a data root made by make_scenes") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a list of scenes as make_scenes writes it ({error!r}): make the data again"
        ) from error


def _scene_record(entry: dict[str, Any]) -> SceneRecord:
    raw = entry["scene"]
    shapes = tuple(Shape(**(shape | {"shade": tuple(shape["shade"])})) for shape in raw["shapes"])
    background = Background(**(raw["background"] | {"tint": tuple(raw["background"]["tint"])}))
    return SceneRecord(
        entry["file_name"], entry["split"], entry["key"], entry["picture"], Scene(raw["side"], shapes, background)
    )

"""What is asserted of a written data set: nothing held out was trained on, and the held-out questions are hard enough.

Everything is read back from the disk; the held-out questions come in as the samples that the readers make of the files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from demo.scenes.drawing import Scene, scene_masks
from demo.scenes.manifest import SceneRecord, hash_image, read_scenes
from demo.scenes.planning import HELD_OUT, KIND_SHARES, TRAIN
from demo.scenes.questions import has_distractor
from demo.scenes.sampling import MAX_SHAPES, MIN_SHAPES
from demo.scenes.writers import GREFCOCO_REFS, IMAGE_FOLDER, MUSE_FILES, REFCOCO_REFS, WORDS_FILE, WORDS_IMAGE_FOLDER
from utils.data.errors import DataError
from utils.data.readers.pickles import load_plain_pickle
from utils.data.samples import Sample, Turn

HIGHEST_BASELINE = 0.40
_SHARE_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class LeakReport:
    """What was compared: images by their use."""

    images_trained_on: int
    images_held_out: int


def check_no_leak(root: str | Path) -> LeakReport:
    """Compare the images that training files name with those that held-out questions name, as they lie on the disk.

    DataError, naming the culprit, when a held-out scene or image (by pixels) occurs in what the base or the masks are
    trained on, when a scene occurs twice, or when a held-out image is not the one that scenes.json describes.
    """
    root = Path(root)
    trained, held_out = _images_named(root)
    records = {record.file_name: record for record in read_scenes(root)}
    _refuse_repeated_scenes(records.values())
    by_hash = {hash_image(_read_image(path)): path for path in _different_files(trained)}
    scenes_trained = {_record_of(path, records).scene.key: path for path in sorted(trained)}
    for path in sorted(held_out):
        record, found = _record_of(path, records), hash_image(_read_image(path))
        if record.split != HELD_OUT or path in trained:
            raise DataError(f"the held-out image {path} is trained on: make the data again")
        if found != record.image_hash:
            raise DataError(f"the held-out image {path} is not the one that was drawn: make the data again")
        if found in by_hash:
            raise DataError(f"the held-out image {path} is the training image {by_hash[found]}: make the data again")
        if record.scene.key in scenes_trained:
            twin = scenes_trained[record.scene.key]
            raise DataError(f"the held-out image {path} shows the scene of {twin}: make the data again")
    return LeakReport(len(by_hash), len(held_out))


def _refuse_repeated_scenes(records: Iterable[SceneRecord]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record.scene.key in seen:
            raise DataError(f"{record.file_name} and {seen[record.scene.key]} show the same scene: make the data again")
        seen[record.scene.key] = record.file_name


def _images_named(root: Path) -> tuple[set[Path], set[Path]]:
    """Paths of the images that are trained on, and of those that held-out questions are about, by all files."""
    named: dict[str, set[Path]] = {TRAIN: set(), HELD_OUT: set()}
    refs = load_plain_pickle((root / REFCOCO_REFS).read_bytes(), str(root / REFCOCO_REFS))
    instances = _read_json(root / REFCOCO_REFS.parent / "instances.json")
    file_names = {image["id"]: image["file_name"] for image in instances["images"]}
    for ref in [*refs, *_read_json(root / GREFCOCO_REFS)]:
        named[ref["split"]].add(root / IMAGE_FOLDER / file_names[ref["image_id"]])
    for split, path in MUSE_FILES.items():
        named[split] |= {root / IMAGE_FOLDER / record["file_name"] for record in _read_json(root / path)}
    named[TRAIN] |= {root / WORDS_IMAGE_FOLDER / entry["image"] for entry in _read_json(root / WORDS_FILE)}
    return named[TRAIN], named[HELD_OUT]


def _different_files(paths: Iterable[Path]) -> list[Path]:
    """The paths without those that lead to a file already listed: images lie under two names, often as hard links."""
    by_file: dict[tuple[int, int], Path] = {}
    for path in sorted(paths):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"the image {path} cannot be read ({error.strerror}): make the data again") from error
        by_file.setdefault((status.st_dev, status.st_ino), path)
    return list(by_file.values())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. DataError when it cannot be read."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"the image {path} is missing or cannot be read: make the data again")
    return np.asarray(image[:, :, ::-1], dtype=np.uint8)


def _record_of(path: Path, records: dict[str, SceneRecord]) -> SceneRecord:
    """What scenes.json says of an image; the one for conversations in words bears the same number in its name."""
    name = path.name if path.name in records else f"COCO_train2014_{path.name}"
    if name not in records:
        raise DataError(f"the image {path} is not among the drawn scenes: make the data again")
    return records[name]


@dataclass(frozen=True, slots=True)
class Difficulty:
    """What the held-out questions are like.

    n: how many; shares: of each kind; shapes: questions about scenes of so many shapes; baselines: gIoU of answers that
    do not read the question, "mask everything" (the whole image), "every shape" (all of the image's) and "largest
    shape".
    """

    n: int
    shares: dict[str, float]
    shapes: dict[int, int]
    baselines: dict[str, float]


def check_difficulty(root: str | Path, samples: Iterable[Sample], least_questions: int = 1000) -> Difficulty:
    """Measure the held-out questions and refuse easy ones.

    samples: the held-out questions as the readers give them (HELD_OUT_SPEC). DataError when there are fewer than
    `least_questions`, when the share of a kind is more than 0.02 off KIND_SHARES, when a scene has not 3 to 6 shapes,
    when a direct question has no distractor of the same colour or form, or when a baseline reaches HIGHEST_BASELINE.
    """
    records = {record.file_name: record for record in read_scenes(root)}
    kinds, shapes, scores = Counter[str](), Counter[int](), dict[str, list[float]]()
    for sample in samples:
        name = Path(sample.image_path).name
        scene = _record_of(Path(sample.image_path), records).scene
        for turn in (turn for conversation in sample.conversations for turn in conversation):
            kinds[turn.kind] += 1
            shapes[len(scene.shapes)] += 1
            if turn.kind == "direct":
                _require_distractor(name, scene, turn)
            for baseline, score in _baseline_scores(scene, turn).items():
                scores.setdefault(baseline, []).append(score)
    n = sum(kinds.values())
    shares = {kind: kinds[kind] / max(n, 1) for kind in KIND_SHARES}
    baselines = {baseline: float(np.mean(values)) for baseline, values in scores.items()}
    found = Difficulty(n, shares, dict(sorted(shapes.items())), baselines)
    _refuse_easy(found, least_questions)
    return found


def _refuse_easy(found: Difficulty, least_questions: int) -> None:
    if found.n < least_questions:
        raise DataError(f"there are {found.n} held-out questions; expected at least {least_questions}")
    for kind, share in KIND_SHARES.items():
        if abs(found.shares[kind] - share) > _SHARE_TOLERANCE:
            raise DataError(
                f"{found.shares[kind]:.1%} of the held-out questions are {kind}; expected about {share:.0%}"
            )
    if min(found.shapes) < MIN_SHAPES or max(found.shapes) > MAX_SHAPES:
        raise DataError(f"held-out scenes have {sorted(found.shapes)} shapes; expected {MIN_SHAPES} to {MAX_SHAPES}")
    for name, score in found.baselines.items():
        if score >= HIGHEST_BASELINE:
            raise DataError(f'the answer "{name}" reaches a gIoU of {score:.3f}; expected less than {HIGHEST_BASELINE}')


def _require_distractor(name: str, scene: Scene, turn: Turn) -> None:
    mask = turn.targets[0].decode() > 0
    meant = [i for i, shape_mask in enumerate(scene_masks(scene)) if np.array_equal(shape_mask > 0, mask)]
    if len(meant) != 1:
        raise DataError(f"the mask of {turn.question!r} about {name} is none of the shapes of its scene")
    if not has_distractor(scene, meant[0]):
        raise DataError(f"no other shape of {name} shares colour or form with the one meant by {turn.question!r}")


def _baseline_scores(scene: Scene, turn: Turn) -> dict[str, float]:
    """IoU of three answers that do not look at the question; without a target, any mask is wrong."""
    masks = scene_masks(scene) > 0
    answers = {
        "mask everything": np.ones(masks.shape[1:], dtype=bool),
        "every shape": masks.any(axis=0),
        "largest shape": masks[int(np.argmax([shape.area for shape in scene.shapes]))],
    }
    if not turn.targets:
        return dict.fromkeys(answers, 0.0)
    truth = np.any([target.decode() > 0 for target in turn.targets], axis=0)
    return {name: float((answer & truth).sum() / (answer | truth).sum()) for name, answer in answers.items()}

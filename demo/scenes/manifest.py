"""scenes.json: which scene each image of a data root shows. Ours, no part of any official format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.scenes.drawing import Background, Scene, Shape
from utils.data.errors import DataError

SCENES_FILE = Path("scenes.json")
_SHAPE_FIELDS = tuple(field.name for field in dataclasses.fields(Shape))


@dataclass(frozen=True, slots=True)
class SceneRecord:
    """One image: its file name, its split ("train" or "val"), the hash of its pixels, the scene it shows."""

    file_name: str
    split: str
    image_hash: str
    scene: Scene

    def as_dict(self) -> dict[str, Any]:
        scene = {
            "side": self.scene.side,
            "shapes": [{name: getattr(shape, name) for name in _SHAPE_FIELDS} for shape in self.scene.shapes],
            "background": dataclasses.asdict(self.scene.background),
        }
        names = {"file_name": self.file_name, "split": self.split, "image_hash": self.image_hash}
        return names | {"scene_key": self.scene.key, "scene": scene}


def hash_image(image: NDArray[np.uint8]) -> str:
    """Hash of size and pixels of an image (H, W, 3)."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:32]


def read_scenes(root: str | Path) -> list[SceneRecord]:
    """The scenes of a data root. DataError when the list is missing or cannot be understood."""
    path = Path(root) / SCENES_FILE
    try:
        return [_record(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["scenes"]]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); expected a data root made by make_scenes"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no list of scenes as make_scenes writes it ({error!r}): make the data again"
        ) from error


def _record(entry: dict[str, Any]) -> SceneRecord:
    raw = entry["scene"]
    shapes = tuple(Shape(**(shape | {"shade": tuple(shape["shade"])})) for shape in raw["shapes"])
    background = Background(**(raw["background"] | {"tint": tuple(raw["background"]["tint"])}))
    scene = Scene(raw["side"], shapes, background)
    if scene.key != entry["scene_key"]:
        raise ValueError(f"the scene of {entry['file_name']} does not have the key written beside it")
    return SceneRecord(entry["file_name"], entry["split"], entry["image_hash"], scene)

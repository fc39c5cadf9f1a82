"""Scenes of coloured shapes: drawn, asked about, and written in the official formats of the data sets they imitate."""

from .conversations import make_conversation, tokenizer_corpus
from .drawing import Scene, Shape, draw_scene, scene_masks
from .questions import find_asks
from .sampling import SceneSettings, sample_scenes
from .words import category_names, named_shape
from .writers import HELD_OUT_SPEC, SceneDataSettings, read_scenes, write_scene_data

__all__ = [
    "HELD_OUT_SPEC",
    "Scene",
    "SceneDataSettings",
    "SceneSettings",
    "Shape",
    "category_names",
    "draw_scene",
    "find_asks",
    "make_conversation",
    "named_shape",
    "read_scenes",
    "sample_scenes",
    "scene_masks",
    "tokenizer_corpus",
    "write_scene_data",
]

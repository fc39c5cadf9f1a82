"""Scenes of coloured shapes: drawn, asked about, and written in the official formats of the data sets they imitate."""

from demo.scenes.checks import Difficulty, LeakReport, check_difficulty, check_no_leak
from demo.scenes.conversations import make_conversation, tokenizer_corpus
from demo.scenes.drawing import Scene, Shape, draw_scene, scene_masks
from demo.scenes.lessons import mask_lessons, patch_lessons, word_lessons, words_of_patches
from demo.scenes.manifest import SceneRecord, read_scenes
from demo.scenes.patches import HINTS, LESSONS, PATCH_WORDS, patch_words
from demo.scenes.planning import SceneDataSettings
from demo.scenes.questions import find_asks
from demo.scenes.sampling import SceneSettings, sample_scenes
from demo.scenes.words import (
    COLOURS,
    COLUMNS,
    FORMS,
    MEANINGS,
    ROWS,
    SIZES,
    category_names,
    named_shape,
)
from demo.scenes.writers import HELD_OUT_SPEC, write_scene_data

__all__ = [
    "COLOURS",
    "COLUMNS",
    "FORMS",
    "HELD_OUT_SPEC",
    "HINTS",
    "LESSONS",
    "MEANINGS",
    "PATCH_WORDS",
    "ROWS",
    "SIZES",
    "Difficulty",
    "LeakReport",
    "Scene",
    "SceneDataSettings",
    "SceneRecord",
    "SceneSettings",
    "Shape",
    "category_names",
    "check_difficulty",
    "check_no_leak",
    "draw_scene",
    "find_asks",
    "make_conversation",
    "mask_lessons",
    "named_shape",
    "patch_lessons",
    "patch_words",
    "read_scenes",
    "sample_scenes",
    "scene_masks",
    "tokenizer_corpus",
    "word_lessons",
    "words_of_patches",
    "write_scene_data",
]

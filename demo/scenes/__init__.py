"""Scenes of coloured shapes: drawn, asked about, and written in the official formats of the data sets they imitate."""

from demo.scenes.checks import Difficulty, LeakReport, check_difficulty, check_no_leak
from demo.scenes.conversations import make_conversation, tokenizer_corpus
from demo.scenes.drawing import Scene, Shape, draw_scene, scene_masks
from demo.scenes.manifest import SceneRecord, read_scenes
from demo.scenes.patches import HINTS, PATCH_WORDS, PRETRAINING_TARGETS, patch_words
from demo.scenes.planning import SceneDataSettings
from demo.scenes.pretraining_targets import draw_patch_targets, encode_conversations, label_patches, read_mask_targets
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
    "MEANINGS",
    "PATCH_WORDS",
    "PRETRAINING_TARGETS",
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
    "draw_patch_targets",
    "draw_scene",
    "encode_conversations",
    "find_asks",
    "label_patches",
    "make_conversation",
    "named_shape",
    "patch_words",
    "read_mask_targets",
    "read_scenes",
    "sample_scenes",
    "scene_masks",
    "tokenizer_corpus",
    "write_scene_data",
]

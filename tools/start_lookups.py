"""Start the language model of a tiny base looking up in the picture what words name, before it is trained in words.

python tools/start_lookups.py --model runs/demo/base_work/start --dataset_dir runs/demo/dataset
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.build.builder import MASK_PARTS, BuiltModel, build_model, save_model
from model.build.lookup_start import Meant, start_looking_up
from utils.data.collate import PICTURE_KEY
from utils.scenes import (
    DIRECTIONS,
    EXTREMES,
    LIST_WORDS,
    PATCH_WORDS,
    PLURALS,
    Scene,
    draw_scene,
    make_conversation,
    patch_words,
    read_scenes,
)
from utils.scripts import run_script

TURNS = 3


def examples(built: BuiltModel, scenes: list[Scene], rng: random.Random) -> dict[str, Any]:
    """Arguments of forward: a conversation in words about each scene."""
    encoded = [built.processor.encode_conversation(make_conversation(scene, rng, TURNS)).input_ids for scene in scenes]
    pictures = [built.processor.encode_picture(draw_scene(scene)) for scene in scenes]
    return {
        "input_ids": pad_sequence(encoded, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in encoded], batch_first=True),
        "pixel_values": {PICTURE_KEY: torch.stack([picture.pixel_values for picture in pictures])},
        "resized_sizes": torch.tensor([picture.resized_size for picture in pictures]),
        "image_index": torch.arange(len(scenes)),
    }


def main(argv: list[str] | None = None) -> None:
    """Write the folder again with its language model started."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model, its tower trained")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="data root made by make_scenes")
    parser.add_argument("--samples", type=int, default=400, help="scenes that are talked about")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    built = build_model(str(args.model))
    torch.manual_seed(args.seed)
    scenes = [record.scene for record in read_scenes(args.dataset_dir) if record.split == "train"][: args.samples]
    patch = built.model.vision_tower.patch_size
    labels = torch.from_numpy(np.stack([patch_words(scene, patch) for scene in scenes]))
    asked = examples(built, scenes, random.Random(args.seed))
    read = start_looking_up(built, PATCH_WORDS, Meant(PLURALS, EXTREMES, {**DIRECTIONS, **LIST_WORDS}), asked, labels)
    for layer, share in read.items():
        print(f"layer {layer}: queries read {share:.0%} of what is named in {len(scenes)} conversations")
    save_model(built.model, built.processor, args.model, left_out=MASK_PARTS)


if __name__ == "__main__":
    sys.exit(run_script(main))

"""Teach the vision tower of a tiny model which colour, form and place each patch is, before it learns a language.

python -m torch.distributed.run --nproc_per_node 2 tools/warm_tower.py \\
    --model runs/demo/start --dataset_dir runs/demo/dataset
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.build.builder import MASK_PARTS, build_model, save_model
from model.build.tiny import PatchReader
from utils.scenes import PATCH_WORDS, Scene, draw_scene, patch_words, read_scenes
from utils.scripts import run_script

WARMUP = 50
LEARNED = ("colour", "form", "size", "column", "row")


def batches(
    scenes: list[Scene], size: int, steps: int, rank: int, ranks: int, patch: int
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Pictures and patch words of this rank's share of every step, drawn again rather than read."""
    order = np.random.default_rng(0)
    for _ in range(steps):
        chosen = order.integers(len(scenes), size=(ranks, size))[rank]
        yield [draw_scene(scenes[i]) for i in chosen], np.stack([patch_words(scenes[i], patch) for i in chosen])


def main(argv: list[str] | None = None) -> None:
    """Train the tower in place: the folder is written again with it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="data root made by make_scenes")
    parser.add_argument("--steps", type=int, default=550)
    parser.add_argument("--batch_size", type=int, default=16, help="pictures per process and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args(argv)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    built = build_model(str(args.model))
    tower = built.model.vision_tower.requires_grad_(True)
    for part in tower.parts_without_loss():
        part.requires_grad_(False)
    reader = PatchReader(built, PATCH_WORDS)
    learner: torch.nn.Module = reader
    if ranks > 1:
        dist.init_process_group("gloo")
        learner = DistributedDataParallel(reader)
    trained = [parameter for parameter in reader.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    scenes = [record.scene for record in read_scenes(args.dataset_dir) if record.split == "train"]
    share = batches(scenes, args.batch_size, args.steps, rank, ranks, tower.patch_size)
    bar = tqdm(share, total=args.steps, disable=rank != 0, unit="step", dynamic_ncols=True)
    for step, (pictures, words) in enumerate(bar):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / WARMUP) * decay
        pixels = torch.stack([built.processor.encode_picture(picture).pixel_values for picture in pictures])
        loss, right = learner(pixels, torch.from_numpy(words))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0:
            shares = " ".join(f"{name} {share:.2f}" for name, share in zip(LEARNED, right.tolist(), strict=True))
            bar.set_postfix_str(f"loss {loss.item():.3f}, right: {shares}", refresh=False)
    if rank == 0:
        save_model(built.model, built.processor, args.model, left_out=MASK_PARTS)
    if ranks > 1:
        dist.barrier()  # a rank that leaves while another still writes can leave that one waiting for good
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_script(main))

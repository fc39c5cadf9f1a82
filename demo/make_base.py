"""Make the tiny base from nothing: a tokenizer and random weights, a tower that learns to see, words about scenes.

python -m demo.make_base --dataset_dir runs/demo/dataset --out runs/demo/base
python -m torch.distributed.run --nproc_per_node 2 -m demo.make_base ...     shared out between two processes
"""

import argparse
import logging
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from demo.lookup_start import Meant, start_looking_up
from demo.mask_start import start_masks_at_words
from demo.muon import make_muon
from demo.patch_reader import PatchBatch, PatchReader
from demo.pipelines import ROOT
from demo.scenes import (
    COLOURS,
    FORMS,
    MEANINGS,
    PATCH_WORDS,
    PRETRAINING_TARGETS,
    Scene,
    draw_patch_targets,
    encode_conversations,
    label_patches,
    read_mask_targets,
    read_scenes,
    tokenizer_corpus,
)
from demo.tiny import TinyShape, make_tiny
from utils.checkpoints.builder import BuiltModel, TrainingRecipe, choose_trainable, save_model
from utils.cli.commands import parse_train
from utils.cli.errors import UserError, run_script
from utils.data.dataset import TrainingDataset
from utils.data.mixture import build_mixture
from utils.engine.fit import Plan, Run, fit_without_resume
from utils.engine.plain_engine import PlainEngine
from utils.engine.runtime import Runtime, open_runtime
from utils.engine.setup import StepBatches, make_plan, optimizer_settings
from utils.engine.stepping import OptimizerSettings, Schedule

logger = logging.getLogger(__name__)

CONFIGS = ROOT / "configs" / "runs"
WORDS_CONFIG, MASKS_CONFIG = str(CONFIGS / "tiny_base.yaml"), str(CONFIGS / "tiny.yaml")
# Of the tower's stage: images a step over all ranks, learning rate, steps of warm-up.
TOWER_BATCH, TOWER_RATE, TOWER_WARMUP = 16, 5e-3, 50
SHAPE = {field.name: field.default for field in fields(TinyShape) if isinstance(field.default, int)}


def warm_tower(built: BuiltModel, scenes: list[Scene], runtime: Runtime, steps: int, folder: Path) -> None:
    """Teach the tower and the projector which colour, form, size and place each patch shows."""
    torch.nn.ModuleList(built.model.vision_tower.requires_grad_(True).parts_without_loss()).requires_grad_(False)
    reader, settings = PatchReader(built, **PRETRAINING_TARGETS), OptimizerSettings()
    engine = PlainEngine(reader, settings, "fp32", runtime.device, make_muon(reader, settings))
    targets = draw_patch_targets(
        scenes, built.processor, TOWER_BATCH // engine.world_size, engine.rank, engine.world_size
    )

    def batches(_: int) -> Iterator[list[PatchBatch]]:
        return ([PatchBatch(pixels, words)] for pixels, words in targets)

    schedule = Schedule(TOWER_RATE, steps, min(TOWER_WARMUP, steps // 2), "cosine")
    Run(engine, Plan(schedule, steps, 0, 0, print_every=10), folder).fit(batches)
    built.model.cpu().eval()


def start_lookups(built: BuiltModel, scenes: list[Scene], seed: int) -> None:
    """Let the language model begin by looking up in the image what words name."""
    torch.manual_seed(seed)
    asked = encode_conversations(scenes, built.processor, random.Random(seed))
    labels = label_patches(scenes, built.model.vision_tower.patch_size)[:, : len(PATCH_WORDS)]
    read = start_looking_up(built, list(PATCH_WORDS.values()), Meant(**MEANINGS), asked, labels)
    shares = ", ".join(f"{share:.0%} in layer {layer}" for layer, share in read.items())
    logger.info(f"queries read, of what is named in {len(scenes)} conversations: {shares}")


def train_words(
    built: BuiltModel, runtime: Runtime, flags: list[str], fixed: Sequence[torch.nn.Module] = ()
) -> PlainEngine:
    """Talk about scenes, as WORDS_CONFIG and `flags` say; `fixed` parts stay as they are. Returns who trained."""
    config = parse_train(["--config", WORDS_CONFIG, "--version", ".", "--engine", "plain", *flags])
    choose_trainable(
        built.model, TrainingRecipe(**{f.name: getattr(config.adapter, f.name) for f in fields(TrainingRecipe)})
    )
    torch.nn.ModuleList(fixed).requires_grad_(False)
    mixture = build_mixture(config.data, config.engine.seed)
    batches = StepBatches(config, runtime, mixture, built.processor)
    settings = optimizer_settings(config.optimizer)
    engine = PlainEngine(
        built.model, settings, config.engine.precision, runtime.device, make_muon(built.model, settings)
    )
    fit_without_resume(Run(engine, make_plan(config, engine.world_size), config.run.folder), batches)
    built.model.cpu().eval()
    batches.report_losses()
    return engine


def start_masks(built: BuiltModel, data: str, count: int, seed: int) -> None:
    """Give the base mask parts that begin at the words it knows, so that training on masks begins with a match."""
    torch.manual_seed(seed)
    config = parse_train(["--config", MASKS_CONFIG, "--version", ".", "--dataset_dir", data])
    targets = read_mask_targets(
        TrainingDataset(build_mixture(config.data, config.engine.seed), built.processor, count), count
    )
    read = start_masks_at_words(built, targets)
    logger.info(f"the codebook reads {read:.0%} of the words that name the targets of {count} images")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; UserError where no scenes are."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dataset_dir", type=Path, required=True, help="data root made by make_scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the base")
    parser.add_argument("--tower_steps", type=int, default=1400)
    parser.add_argument("--sentence_steps", type=int, default=150, help="of words, before looking up is started")
    parser.add_argument("--samples", type=int, default=400, help="scenes whose questions are read where parts start")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--words", nargs=argparse.REMAINDER, default=[], help="last: what train_ds.py's flags override")
    args = parser.parse_args(argv)
    if not ((data := args.dataset_dir) / "scenes.json").is_file():
        raise UserError(f"{data} holds no scenes: make them with python -m demo.make_scenes --out {data}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Make the base; TensorBoard finds the curves in OUT's neighbour folder `NAME_work`."""
    args = parse(argv)
    runtime = open_runtime("plain", 0, "fp32")
    data, work = str(args.dataset_dir.resolve()), args.out.resolve().with_name(args.out.name + "_work")
    if runtime.rank == 0:
        shutil.rmtree(work, ignore_errors=True)
    scenes = [record.scene for record in read_scenes(args.dataset_dir) if record.split == "train"]
    logger.info("--- show the tower what colours and forms are")
    shape = TinyShape(**{name: getattr(args, name) for name in SHAPE})
    built = make_tiny(tokenizer_corpus(), shape, args.seed, names=(*COLOURS, *FORMS))
    warm_tower(built, scenes, runtime, args.tower_steps, work / "tower")
    where = ["--dataset_dir", data, "--log_base_dir", str(work)]
    logger.info("--- learn how sentences go")
    decoder = built.model.language_model.get_decoder()
    started_later = decoder.embed_tokens, *(layer.self_attn for layer in decoder.layers[1:])
    few = [*where, *args.words, "--exp_name", "sentences", "--max_steps", str(args.sentence_steps)]
    train_words(built, runtime, few, started_later)
    logger.info("--- talk about scenes")
    if runtime.rank == 0:  # the engine gives its weights to the others
        start_lookups(built, scenes[: args.samples], args.seed)
    engine = train_words(built, runtime, [*where, "--exp_name", "words", *args.words])
    if runtime.rank == 0:
        start_masks(built, data, args.samples, args.seed)
        save_model(built.model, built.processor, args.out)
    engine.close()


if __name__ == "__main__":
    sys.exit(run_script(main))

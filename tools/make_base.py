"""Make the tiny base from nothing: a tokenizer and random weights, a tower that learns to see, words about scenes.

python tools/make_base.py --dataset_dir runs/demo/dataset --out runs/demo/base
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.build.builder import MASK_PARTS, save_model
from model.build.tiny import TinyShape, make_tiny
from utils.demo import RANKS
from utils.scenes import COLOURS, FORMS, tokenizer_corpus
from utils.scripts import UserError, run_script
from utils.stages import Stage, launcher, run_stage

CONFIG = "configs/tiny_base.yaml"
SMOKE_STEPS = 6


def stages(args: argparse.Namespace, work: Path) -> Iterator[Stage]:
    """Warm the tower, start lookups, train in words, write the folder, start its mask parts."""
    data, ranks = str(args.dataset_dir.resolve()), RANKS if args.engine == "deepspeed" else 1
    env = {"OMP_NUM_THREADS": str(RANKS // ranks)}
    start, out = str(work / "start"), str(args.out.resolve())
    spread = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)) if ranks > 1 else ()
    steps = ("--steps", str(SMOKE_STEPS if args.smoke else args.tower_steps))
    warm = (*spread, "tools/warm_tower.py", "--model", start, "--dataset_dir", data, *steps)
    yield Stage("tower", "show the tower what colours and forms are", (sys.executable, *warm), ROOT, env)
    start_lookups = ("tools/start_lookups.py", "--model", start, "--dataset_dir", data)
    few_scenes = ("--samples", "40") if args.smoke else ()
    yield Stage(
        "lookups", "start looking up words in pictures", (sys.executable, *start_lookups, *few_scenes), ROOT, env
    )
    words = ("train_ds.py", "--config", CONFIG, "--version", start, "--dataset_dir", data, "--engine", args.engine)
    where = ("--log_base_dir", str(work), "--exp_name", "words")
    few = ("--max_steps", str(SMOKE_STEPS), "--warmup_steps", "2") if args.smoke else ()
    rounds = () if ranks == RANKS else ("--grad_accumulation_steps", str(RANKS))
    command = (*launcher(args.engine, ranks), *words, *where, *few, *rounds)
    yield Stage("words", "talk about scenes", command, ROOT, env)
    weight = work / "words" / "ckpt_model"
    if args.engine == "deepspeed":
        yield Stage(
            "gather", "collect the weights", (sys.executable, "zero_to_fp32.py", ".", "../weights"), weight, env
        )
        weight = work / "words" / "weights"
    merge = ("merge_lora_weights_and_save_hf_model.py", "--version", start, "--weight", str(weight), "--save_path", out)
    yield Stage("folder", "write the base", (sys.executable, *merge, "--precision", "fp32"), ROOT, env)
    start_masks = ("tools/start_masks.py", "--model", out, "--dataset_dir", data)
    few_samples = ("--samples", "32") if args.smoke else ()
    yield Stage("masks", "start masks at words", (sys.executable, *start_masks, *few_samples), ROOT, env)


def main(argv: list[str] | None = None) -> None:
    """Make the base; its parts stay in OUT's neighbour folder `NAME_work`, where TensorBoard finds the curves."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dataset_dir", type=Path, required=True, help="data root made by make_scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the base")
    parser.add_argument("--engine", choices=("deepspeed", "plain"), default="plain")
    parser.add_argument("--tower_steps", type=int, default=650)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything: learns nothing")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(TinyShape):
        if isinstance(field.default, int):
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    args = parser.parse_args(argv)
    if not (args.dataset_dir / "scenes.json").is_file():
        raise UserError(
            f"{args.dataset_dir} holds no scenes: make them with tools/make_scenes.py --out {args.dataset_dir}"
        )
    shape = TinyShape(**{f.name: getattr(args, f.name) for f in fields(TinyShape) if isinstance(f.default, int)})
    work = args.out.resolve().with_name(args.out.name + "_work")
    shutil.rmtree(work, ignore_errors=True)
    built = make_tiny(tokenizer_corpus(), shape, args.seed, names=(*COLOURS, *FORMS))
    save_model(built.model, built.processor, work / "start", left_out=MASK_PARTS)
    for stage in stages(args, work):
        print(f"--- {stage.title}", flush=True)
        run_stage(stage)


if __name__ == "__main__":
    sys.exit(run_script(main))

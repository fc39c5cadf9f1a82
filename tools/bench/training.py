"""What a training step costs: its parts, the share of the GPU's peak, memory; by batch size and by checkpointing.

python -m tools.bench.training               on a GPU: 7B, LoRA, bfloat16, ZeRO-2; runs/bench/training.json
python -m tools.bench.training --bits 4      the same with frozen layers in 4 bits
python -m tools.bench.training --size tiny   the same steps in a minute on a CPU, where this is the size by itself
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tools.bench.measured_training import TRAINED_SHAPES, batch_to_train, model_to_train
from utils.cli.atomic_files import write_json
from utils.cli.errors import run_script
from utils.cli.run_card import versions
from utils.data.collate import Batch
from utils.engine.base import Engine
from utils.engine.plain_engine import PlainEngine
from utils.engine.probe import probe_gradients
from utils.engine.runtime import Runtime, open_runtime
from utils.engine.stepping import OptimizerSettings, to_precision
from utils.engine.throughput import Throughput, reset_peak_memory

logger = logging.getLogger(__name__)

WARM_UP, RATE, STAGE, PRECISION = 2, 1e-4, 2, "bf16"
PARTS = ("forward", "backward", "optimizer", "communication", "other")


@dataclass(frozen=True)
class Setting:
    """What is measured. size: of TRAINED_SHAPES. bits: of a frozen weight of the language model; 0 for bfloat16."""

    size: str
    batch: int
    checkpointing: bool
    steps: int
    bits: int = 0


def case(setting: Setting, engine: str) -> dict[str, Any]:
    """Figures of one setting, as `Throughput` names them; {"failed": why} where memory does not suffice."""
    runtime = open_runtime(engine, 0, PRECISION)
    try:
        return measured(setting, runtime)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def measured(setting: Setting, runtime: Runtime) -> dict[str, Any]:
    """See `case`."""
    shape, batch = TRAINED_SHAPES[setting.size], setting.batch
    model, trained = model_to_train(shape, runtime.device, setting.checkpointing, setting.bits or None)
    to_precision(model, PRECISION)
    examples = Batch(**batch_to_train(model, batch), info=[{}] * batch)
    flops = probe_gradients(model, examples, trained, PRECISION, runtime.device) / batch
    numbers = sum(parameter.numel() for parameter in model.parameters())
    engine = make_engine(model, batch, runtime)
    for _ in range(WARM_UP):
        engine.train_step([examples], RATE)
    reset_peak_memory(runtime.device)
    costs = Throughput(runtime.device, engine.world_size, flops)
    for _ in range(setting.steps):
        began = time.perf_counter()
        report = engine.train_step([examples], RATE)
        costs.add(time.perf_counter() - began, [examples], dict(report.seconds))
    engine.close()
    facts = {"engine": runtime.engine, "device": device_name(runtime.device), "parameters": numbers}
    return facts | {"flops_per_image": flops, "seconds_per_step": costs.seconds(), **costs.metrics()}


def make_engine(model: Any, batch: int, runtime: Runtime) -> Engine:
    if runtime.engine == "plain":
        return PlainEngine(model, OptimizerSettings(), PRECISION, runtime.device)
    from utils.engine.deepspeed_engine import DeepSpeedEngine  # not installed on every laptop

    settings = OptimizerSettings()
    return DeepSpeedEngine(
        model, settings, PRECISION, runtime.device, micro_batch=batch, gradient_accumulation_steps=1, zero_stage=STAGE
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Rows in Markdown. A share of the peak is only there where the GPU is known."""
    head = ["batch", "checkpointing", "s / step", *PARTS, "images / s", "tokens / s", "MFU", "peak GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "--:|" * len(head)]
    for name, found in cases.items():
        batch, checkpointing = name.split()
        if "failed" in found:
            cells = [found["failed"], *[""] * (len(head) - 3)]
        else:
            parts = [f"{found.get(f'seconds/{part}', 0.0):.3f}" for part in PARTS]
            rates = [f"{found[f'speed/{what}_per_second']:.1f}" for what in ("images", "tokens")]
            used = f"{found['speed/mfu']:.1%}" if "speed/mfu" in found else "–"
            cells = [f"{found['seconds_per_step']:.3f}", *parts, *rates, used, f"{found['memory/peak_gib']:.2f}"]
        lines.append("| " + " | ".join([batch, checkpointing, *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Every setting in a process of its own, whose memory nothing else has touched; then the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--size", choices=list(TRAINED_SHAPES), default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--batches", default="1,2,4", help="images in a step, several joined by commas")
    parser.add_argument("--steps", type=int, default=10, help="steps that figures are taken over")
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0, help="of frozen weights; 0: bfloat16")
    parser.add_argument("--engine", choices=("auto", "deepspeed", "plain"), default="deepspeed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--case", nargs=2, metavar=("BATCH", "ON_OR_OFF"), help="one setting; its figures as JSON")
    args = parser.parse_args(argv)
    if args.case:
        batch, checkpointing = args.case
        setting = Setting(args.size, int(batch), checkpointing == "on", args.steps, args.bits)
        print(json.dumps(case(setting, args.engine)))
        return
    command = [
        sys.executable,
        "-m",
        "tools.bench.training",
        "--size",
        args.size,
        "--steps",
        str(args.steps),
        "--engine",
        args.engine,
    ]
    command += ["--bits", str(args.bits)]
    cases: dict[str, dict[str, Any]] = {}
    for batch, checkpointing in product(args.batches.split(","), ("on", "off")):
        said = subprocess.run([*command, "--case", batch, checkpointing], check=True, stdout=subprocess.PIPE, text=True)
        cases[f"{batch} {checkpointing}"] = json.loads(said.stdout.splitlines()[-1])
        logger.info(f"batch {batch}, checkpointing {checkpointing}: done")
    write_json(
        args.out / "training.json", {"size": args.size, "bits": args.bits, "versions": versions(), "cases": cases}
    )
    print(table(cases))
    print(f"written to {args.out / 'training.json'}")


if __name__ == "__main__":
    sys.exit(run_script(main))

"""What a token costs: a model of 7B's shape with random weights in bfloat16 answers one question about one image.

python -m tools.bench.decoding                 on a GPU; runs/bench/decoding.json
python -m tools.bench.decoding --size tiny     the same in seconds on a CPU; its numbers mean nothing
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from model.generation import Decoding
from tools.bench.baselines import (
    END_TOKEN,
    Says,
    bytes_read_per_token,
    measured_answer,
    measured_images,
    measured_model,
    measured_prompts,
)
from tools.bench.measure import interleaved
from tools.bench.measured_training import TRAINED_SHAPES, default_dtype
from utils.cli.atomic_files import write_json
from utils.cli.errors import run_script
from utils.cli.run_card import versions

TARGETS, SHORT, LONG = 3, 32, 160
RUNS = 5


def measure(size: str, device: torch.device, runs: int = RUNS) -> dict[str, Any]:
    """Seconds of a short and a long answer, and of a token: their difference over what the long one has more."""
    with torch.device(device), default_dtype(torch.bfloat16):
        model = measured_model(TRAINED_SHAPES[size])
    ways = {str(length): lambda length=length: answer(model, length) for length in (SHORT, LONG)}
    seconds = interleaved(ways, dict.fromkeys(ways, runs))
    step = (seconds[str(LONG)]["least"] - seconds[str(SHORT)]["least"]) / (LONG - SHORT)
    return {
        "size": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "parameters": sum(one.numel() for one in model.parameters()),
        "seconds": seconds,
        "seconds_per_token": step,
        "gigabytes_read_per_token": bytes_read_per_token(model) / 1e9,
        "gigabytes_per_second": bytes_read_per_token(model) / 1e9 / step if step > 0 else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "versions": versions(),
    }


@torch.inference_mode()
def answer(model: Any, length: int) -> None:
    """One answer of `length` tokens with TARGETS seg groups, its masks included."""
    device = next(model.parameters()).device
    (prompt,), images = measured_prompts(model, 1), measured_images(1)
    pixels = {name: one.to(device, model.dtype) for name, one in images["pixel_values"].items()}
    says = Says(measured_answer(model, length, TARGETS), len(prompt))
    model.generate_answers(
        pixels,
        images["resized_sizes"].to(device),
        [prompt.to(device)],
        torch.zeros(1, dtype=torch.long, device=device),
        END_TOKEN,
        length,
        Decoding(LogitsProcessorList([says])),
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--size", choices=list(TRAINED_SHAPES), default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(args.size, device)
    write_json(args.out / "decoding.json", found)
    print(f"{1000 * found['seconds_per_token']:.2f} ms a token; written to {args.out / 'decoding.json'}")


if __name__ == "__main__":
    sys.exit(run_script(main))

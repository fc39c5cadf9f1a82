"""Measure answering and training against the release's way and against a plain cache, on one model of random weights.

python -m tools.bench.answering               some 170 million parameters, two threads; runs/bench/summary.json
python -m tools.bench.answering --size smoke  the same steps in seconds; its ratios mean nothing
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.modeling_pixellm import PixelLMForCausalLM
from tools.bench import baselines as base
from tools.bench import measure
from tools.bench.measure import Range
from utils.cli.atomic_files import write_json
from utils.cli.errors import run_script
from utils.cli.run_card import versions
from utils.evaluation.thresholds import Expectations, Threshold, compare, format_table, list_misses

LENGTH, TARGETS, MASK_ATOL = 58, 3, 3e-5
THRESHOLDS: Expectations = (
    Threshold("answer_speedup_without_cache", ">=", 20.0),
    Threshold("answer_speedup_with_cache", ">=", 1.5),
    Threshold("four_questions_speedup_with_cache", ">=", 2.8),
    Threshold("train_speedup", ">=", 2.5),
    Threshold("train_memory_ratio", "<=", 0.75),
    Threshold("plain_cache_step_over_generate", "<=", 1.1),
    "tokens_per_second",
    "plain_cache_tokens_per_second",
    "tokens_per_second_memory_allows",
)


def answering(model: PixelLMForCausalLM, full: bool) -> tuple[dict[str, Range], dict[str, Any]]:
    """Seconds of each way for one question and for four, and how far their results are apart."""
    kept: dict[str, base.Answered] = {}

    def keep(name: str, way: Callable, count: int) -> None:
        kept[name] = base.answered(model, way, count, LENGTH, TARGETS)

    asked = [(name, count) for count in (1, 4) for name in base.WAYS if (name, count) != ("release", 4)]
    ways = {f"{name}_{count}": partial(keep, f"{name}_{count}", base.WAYS[name], count) for name, count in asked}
    rounds = {name: (5 if name.endswith("_1") else 3) if full and name != "release_1" else 2 for name in ways}
    seconds = measure.interleaved(ways, rounds)
    pairs = [("ours_1", "plain_cache_1"), ("ours_1", "release_1"), ("ours_4", "plain_cache_4")]
    return seconds, {f"{one} and {other}": base.apart(kept[one], kept[other]) for one, other in pairs}


def steps(model: PixelLMForCausalLM, full: bool) -> dict[str, float]:
    """Seconds of a decoding step of plain_cache and of transformers' own generate, at equal numbers of positions."""
    kinds = {"plain_cache": base.decode_plainly, "generate": base.decode_with_generate}
    ways = {f"{name}_{length}": partial(way, model, length) for name, way in kinds.items() for length in (1, LENGTH)}
    taken = measure.interleaved(ways, dict.fromkeys(ways, 5 if full else 2))
    return {name: (taken[f"{name}_{LENGTH}"]["median"] - taken[f"{name}_1"]["median"]) / (LENGTH - 1) for name in kinds}


def training(size: str, full: bool) -> tuple[dict[str, Range], float]:
    """Seconds of a step of each way, and how far their losses are apart, relatively."""
    model, batch = base.trainable_model(base.SHAPES[size])
    losses: dict[str, float] = {}

    def step(name: str) -> None:
        model.zero_grad()
        losses[name] = float(base.STEPS[name](model, batch))

    seconds = measure.interleaved(
        {name: partial(step, name) for name in base.STEPS}, dict.fromkeys(base.STEPS, 4 if full else 2)
    )
    return seconds, abs(losses["ours"] / losses["release"] - 1)


def costs(model: PixelLMForCausalLM, full: bool) -> dict[str, dict[str, float]]:
    """Seconds of ours by length of the answer, targets, questions about an image, and images of a batch."""
    runs: dict[str, dict[int, Callable]] = {
        "tokens": {n: partial(base.answered, model, base.ours, 1, n, 0) for n in (16, 64, 256)},
        "targets": {n: partial(base.answered, model, base.ours, 1, 240, n) for n in (1, 3, 10, 34)},
        "questions": {n: partial(base.answered, model, base.ours, n, LENGTH, TARGETS) for n in (1, 4, 16)},
        "images": {n: partial(base.answered, model, base.ours, n, LENGTH, TARGETS, n) for n in (1, 4, 8)},
    }
    kinds = runs if full else {kind: dict(list(ways.items())[:2]) for kind, ways in runs.items()}
    return {kind: measure.beside({str(n): way for n, way in ways.items()}) for kind, ways in kinds.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure, write summary.json and print it; 1 when a threshold is missed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--size", choices=list(base.SHAPES), default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak_of", default="", help="bytes held at most over the loaded model, for one kind")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        work = base.work_of(args.peak_of, base.SHAPES[args.size], LENGTH, TARGETS)
        loaded = measure.forget_peak()
        work()
        print(json.dumps({"loaded": loaded, "over_loaded": measure.peak_bytes() - loaded}))
        return 0
    full, model = args.size == "full", base.measured_model(base.SHAPES[args.size])
    phases = measure.Phases()
    seconds, differences = phases.do("answering", lambda: answering(model, full))
    step = phases.do("decoding steps", lambda: steps(model, full))
    train, loss_difference = phases.do("training", lambda: training(args.size, full))
    again = [
        sys.executable,
        "-m",
        "tools.bench.answering",
        "--size",
        args.size,
        "--threads",
        str(args.threads),
        "--peak_of",
    ]
    kinds = ("answer_ours", "answer_plain_cache", "train_ours", "train_release")
    used, read = phases.do("memory", lambda: measure.peaks(again, kinds)), measure.bandwidth()
    spent = phases.do("costs", lambda: costs(model, full))
    compiled = phases.do("compiling", lambda: base.compiled_answer(model, LENGTH, TARGETS))
    numbers = {
        "answer_speedup_without_cache": seconds["release_1"]["median"] / seconds["ours_1"]["median"],
        "answer_speedup_with_cache": seconds["plain_cache_1"]["median"] / seconds["ours_1"]["median"],
        "four_questions_speedup_with_cache": seconds["plain_cache_4"]["median"] / seconds["ours_4"]["median"],
        "train_speedup": train["release"]["median"] / train["ours"]["median"],
        "train_memory_ratio": used["train_ours"]["over_loaded"] / used["train_release"]["over_loaded"],
        "plain_cache_step_over_generate": step["plain_cache"] / step["generate"],
        "tokens_per_second": measure.rate(spent["tokens"]),
        "plain_cache_tokens_per_second": 1 / step["plain_cache"],
        "tokens_per_second_memory_allows": read / base.bytes_read_per_token(model),
    }
    wrong = [name for name, one in differences.items() if not one["same_text"] or one["mask_logits"] > MASK_ATOL]
    wrong += ["training loss"] if loss_difference > 1e-5 else []
    rows = compare(numbers, THRESHOLDS)
    below = list_misses(rows) if full else []
    facts = {"size": args.size, "threads": args.threads, "versions": versions(), "bytes_per_second": read}
    facts |= {"parameters": sum(one.numel() for one in model.parameters()), "phases": phases.seconds}
    facts |= {"differences": differences, "train_loss_difference": loss_difference, "memory": used}
    facts |= {"seconds": seconds, "train_seconds": train, "step_seconds": step, "costs": spent, "compiled": compiled}
    write_json(args.out / "summary.json", numbers | {"missed": below, "wrong": wrong} | facts)
    print(format_table(rows, with_thresholds=full))
    print(f"written to {args.out / 'summary.json'}")
    for sentence in below:
        print(f"bench: missed: {sentence}", file=sys.stderr)
    for name in wrong:
        print(f"results differ: {name}", file=sys.stderr)
    return 1 if below or wrong else 0


if __name__ == "__main__":
    sys.exit(run_script(main))

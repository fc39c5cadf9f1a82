"""Before the first step: what a run is about to do, in numbers, and what would go wrong much later."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.cli.config import OptimizerConfig, TrainConfig
from utils.cli.errors import UserError
from utils.data.mixture import Mixture
from utils.engine.runtime import Runtime
from utils.engine.stepping import full_numel

logger = logging.getLogger(__name__)

GIB = 2**30
# Bytes for each number that trains, beside the weight itself: gradient, and AdamW's two moments, all in float32.
GRADIENT, MOMENTS, MASTER = 4, 8, 4
# A score that masking everything would reach on things of usual size.
CHANCE = 0.05
CHECKLIST = (
    "do masks lie on their images (check_data.py --show 8)",
    "do the weights load (the table at the start)",
    "is the end of answers learned (--max_new_tokens, the drawn answers in TensorBoard)",
    "is --seg_token_num the one the base was made with",
    "did --lr or --warmup_steps let the losses rise (loss/bce and loss/dice in TensorBoard)",
)


def preflight(
    config: TrainConfig, runtime: Runtime, model: Any, tokens: int, mixture: Mixture, zero_stage: int
) -> None:
    """Say what the run is about to do, and refuse what cannot go well. tokens: see `require_rows`. zero_stage: 0
    without DeepSpeed."""
    require_rows(tokens, model.get_input_embeddings().num_embeddings, model.get_output_embeddings().out_features)
    logger.info(mixture.describe())
    logger.info(batch_arithmetic(config.optimizer, runtime.world_size))
    samples = config.optimizer.samples_per_step(runtime.world_size) * config.optimizer.total_steps()
    names, sizes = [reader.name for reader in mixture.readers], [len(reader) for reader in mixture.readers]
    logger.info(describe_draws(names, mixture.shares, sizes, samples))
    log_memory(model, runtime, zero_stage)


def batch_arithmetic(optimizer: OptimizerConfig, world_size: int) -> str:
    """One line: how a step is made up, and how much the run sees."""
    steps, step = optimizer.total_steps(), optimizer.samples_per_step(world_size)
    return (
        f"a step is {optimizer.batch_size} images x {world_size} ranks x {optimizer.grad_accumulation_steps} rounds = "
        f"{step} samples; {steps:,} steps take {step * steps:,}"
    )


def describe_draws(names: Iterable[str], shares: Iterable[float], sizes: Iterable[int], samples: int) -> str:
    """A line per data set: how many of the run's samples come from it, and how often it is gone through."""
    lines = [
        f"{name}: about {share * samples:,.0f} samples, {share * samples / max(size, 1):.1f} times its {size:,} images"
        for name, share, size in zip(names, shares, sizes, strict=True)
    ]
    return "\n".join(lines)


def require_rows(tokens: int, rows_in: int, rows_out: int) -> None:
    """UserError where a token has no row in the tables of the language model.

    tokens: how many the tokenizer has, less an image's placeholder, which is neither embedded nor predicted. rows_in,
    rows_out: rows of the embedding table and of lm_head.
    """
    lacking = [name for name, rows in (("embedding table", rows_in), ("lm_head", rows_out)) if rows < tokens]
    if lacking:
        raise UserError(
            f"the tokenizer has {tokens} tokens, but the {' and the '.join(lacking)} only {min(rows_in, rows_out)} "
            "rows: the folder in --version is not whole, or its tokenizer is another model's"
        )


def required_memory(model: nn.Module, stage: int, ranks: int) -> int:
    """Bytes per rank for weights, gradients and AdamW; activations come on top.

    stage: ZeRO stage, 0 for the plain engine too. From stage 1 on moments (and a float32 copy of what trains) are
    shared out to the ranks, from 2 on gradients, from 3 on weights.
    """
    weights = sum(full_numel(p) * p.element_size() for p in model.parameters())
    trained = sum(full_numel(p) for p in model.parameters() if p.requires_grad)
    optimizer = trained * (MOMENTS + (MASTER if stage else 0))
    shares = [weights / (ranks if stage >= 3 else 1), trained * GRADIENT / (ranks if stage >= 2 else 1)]
    return int(sum(shares) + optimizer / (ranks if stage >= 1 else 1))


def available_memory(device: torch.device, local_ranks: int) -> int | None:
    """Bytes a rank can have: those of its GPU, or its part of what this machine has to spare; None where not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    return available // max(local_ranks, 1)


def log_memory(model: nn.Module, runtime: Runtime, stage: int) -> None:
    """Say what is needed against what is there, and where that cannot be enough."""
    needed = required_memory(model, stage, runtime.world_size)
    there = available_memory(runtime.device, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))))
    known = "" if there is None else f" of {there / GIB:.2f} GiB"
    logger.info(
        f"weights, gradients and optimizer take about {needed / GIB:.2f} GiB{known} per rank; activations come on top"
    )
    if there is not None and needed > there:
        logger.warning(
            "warning: that does not fit: more ranks with --zero_stage 3, offload in --deepspeed_config, --precision "
            "bf16 or fewer parts that train take less"
        )


def warn_below_chance(score: float) -> str | None:
    """What to look at when a first score is below chance; None where it is not."""
    if score >= CHANCE:
        return None
    return f"the score {score:.3f} is below chance; what usually is wrong: {'; '.join(CHECKLIST)}"

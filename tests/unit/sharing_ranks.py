"""Run under a launcher by test_prefix_sharing.py: a step of two ranks, with and without shared rows.

python -m torch.distributed.run --nproc_per_node 2 -m tests.unit.sharing_ranks FOLDER
"""

import sys
from pathlib import Path

import torch

from tests.unit.engine_real import real_step
from tests.unit.engine_toys import gradients
from utils.engine.plain_engine import PlainEngine
from utils.engine.runtime import Runtime, open_runtime
from utils.engine.stepping import OptimizerSettings

ROUNDS = 2


def step_of(
    folder: Path, runtime: Runtime, sharing: bool, rounds: int = ROUNDS
) -> tuple[dict[str, float], torch.Tensor, int]:
    """Losses by name and all gradients of a step, and how many conversations found another about their image."""
    model, batches = real_step(folder, runtime, rounds)
    model.prefix_sharing = sharing
    losses, _ = PlainEngine(model, OptimizerSettings(), "fp32", runtime.device).accumulate(batches)
    together = sum(len(batch.image_index) - len(batch.image_index.unique()) for batch in batches)
    return losses, gradients(model), together


if __name__ == "__main__":
    place = Path(sys.argv[1])
    runtime = open_runtime("plain", 0, "fp32")
    found = {sharing: step_of(place, runtime, sharing) for sharing in (True, False)}
    if runtime.rank == 0:
        torch.save(found, place / "sharing.pt")

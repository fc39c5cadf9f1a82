"""Every random state of a process: of Python, of NumPy, of torch on the CPU and on this process's GPU."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_state_file(place: Path, rank: int) -> Path:
    """Where a checkpoint keeps the random states of a rank."""
    return place / f"random_rank{rank}.pt"


def random_state(device: torch.device) -> dict[str, Any]:
    """The states now, in what `torch.load(weights_only=True)` reads."""
    kind, words, numbers_used, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words, dtype=np.int64)), numbers_used, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on drawing where `state` was taken."""
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

"""Checkpoints of a run: what an engine writes, and every rank's random state, as one folder that is whole or not there.

All ranks call everything here together.
"""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.cli.errors import UserError
from utils.engine import checkpoints
from utils.engine.base import Engine
from utils.engine.checkpoints import explain_write_errors
from utils.engine.stepping import full_numel

logger = logging.getLogger(__name__)


def save_checkpoint(engine: Engine, folder: Path, step: int, client_state: dict[str, Any], keep_last: int = 1) -> Path:
    """Write the checkpoint of `step`, then remove those it supersedes. UserError where it cannot be written."""
    place = folder / checkpoints.tag_for(step)
    scratch = place.with_name(place.name + checkpoints.WRITING)
    with explain_write_errors(scratch):
        if engine.rank == 0:
            checkpoints.prepare_scratch(place)
            checkpoints.require_space(folder, bytes_needed(engine, folder))
        engine.barrier()
        engine.save(scratch, client_state)
        torch.save(random_state(engine.device), random_state_file(scratch, engine.rank))
        # A file's bytes are brought to the disk by the node that wrote them, the others find nothing left to do.
        for path in checkpoints.files_of(scratch):
            checkpoints.fsync_path(path)
        engine.barrier()
        if engine.rank == 0:
            checkpoints.publish(scratch, place)
            checkpoints.remove_superseded(folder, keep_last)
    engine.barrier()
    return place


def bytes_needed(engine: Engine, folder: Path) -> int:
    """About what the next checkpoint takes: what the last one took, or the weights and AdamW's two moments."""
    last = checkpoints.latest_tag(folder)
    if last is not None:
        return checkpoints.checkpoint_bytes(folder / last)
    sizes = [(full_numel(p) * p.element_size(), p.requires_grad) for p in engine.model.parameters()]
    return sum(size for size, _ in sizes) + 2 * sum(size for size, trains in sizes if trains)


def find_checkpoint(engine: Engine, folder: Path) -> Path:
    """The newest checkpoint in `folder` that verifies (or `folder` itself, where it is one), the same on every rank.

    Says what it passed over. UserError where none is whole: a run must not start anew without being told to.
    """
    found: tuple[str | None, dict[str, str]] = (None, {})
    if engine.rank == 0:
        if (folder / checkpoints.MANIFEST).is_file():
            why = checkpoints.find_problem(folder)
            found = (None, {folder.name: why}) if why else ("", {})
        else:
            found = checkpoints.newest_verified(folder)
    tag, skipped = engine.gather(found)[0]
    if tag is None and skipped:
        raise UserError(
            f"no checkpoint in {folder} is whole ({'; '.join(f'{name}: {why}' for name, why in skipped.items())}): "
            "bring one back from a copy, or start anew with --no_auto_resume"
        )
    for name, why in skipped.items():
        logger.warning(f"passed over the checkpoint {folder / name}: {why}")
    if tag is None:
        raise UserError(f"there is no checkpoint in {folder}: expected folders step1, step2, … with a manifest in each")
    return folder / tag if tag else folder


def load_checkpoint(engine: Engine, place: Path) -> dict[str, Any]:
    """Read a checkpoint into `engine` and go on with this rank's random numbers; returns the client state."""
    client_state = engine.load(place)
    path = random_state_file(place, engine.rank)
    ranks = len(list(place.glob(random_state_file(place, 0).name.replace("0", "*"))))
    if ranks == engine.world_size and path.is_file():
        restore_random_state(torch.load(path, map_location="cpu", weights_only=True), engine.device)
    else:
        logger.warning(
            f"{place} was written by {ranks} processes and this run has {engine.world_size}: dropout is drawn anew"
        )
    return client_state


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

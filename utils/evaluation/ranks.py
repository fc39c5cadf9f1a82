"""Evaluation by several processes that a launcher such as torchrun started; they share a folder and a barrier."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

# A rank whose share is done waits for the slowest; a launcher ends all when one of them fails.
_LONGEST_WAIT = timedelta(days=14)


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many."""

    rank: int = 0
    world_size: int = 1

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Take leave of the others."""
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def open_ranks() -> Ranks:
    """The ranks the launcher's environment tells of, joined over gloo; one process without a launcher."""
    found = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if found.world_size > 1:
        torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    return found


def device_of_rank(device: str) -> str:
    """The device `device` names for this process: of "auto" and "cuda", where there are GPUs, the one of its local
    rank."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in {"auto", "cuda"} or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"

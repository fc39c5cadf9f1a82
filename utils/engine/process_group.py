"""Collective calls between the processes of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from utils.cli.errors import UserError

# How gloo and NCCL word that a peer is gone.
BROKEN_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Broken pipe",
    "Socket Timeout",
    "NCCL communicator was aborted",
)


class PeerLost(UserError):
    """Another process of the run ended; it has said why itself."""


@contextmanager
def explain_lost_peer() -> Iterator[None]:
    """Around collective calls: a connection that breaks means that another rank ended; no mistake of this one."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in BROKEN_CONNECTION):
            raise
        raise PeerLost("another process of this run ended, so this one ends too: its own message says why") from error


class ProcessGroup:
    """The processes of a run: this one's rank, how many there are, and what they do together.

    All ranks call every method together. Where torch.distributed was not initialised there is one process.
    """

    def __init__(self, device: torch.device) -> None:
        several = dist.is_initialized()
        self.device = device
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world_size > 1:
            with explain_lost_peer():
                dist.all_reduce(values)
        return values

    def add(self, numbers: list[float]) -> list[float]:
        """Sums of a list of numbers over all ranks, item by item."""
        if self.world_size == 1:
            return [float(number) for number in numbers]
        return self.sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank."""
        gathered: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with explain_lost_peer():
                dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            with explain_lost_peer():
                dist.barrier()

    def close(self) -> None:
        """Wait for all ranks and leave them."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

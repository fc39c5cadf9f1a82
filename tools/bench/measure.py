"""Measuring: ways of doing the same thing in turns, medians with ranges, memory of a process, what memory gives."""

import json
import logging
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)


Range = dict[str, float]
T = TypeVar("T")


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: Mapping[str, int]) -> dict[str, Range]:
    """Seconds of each way: median, least, most and runs. In every round each way that still has runs left goes once,
    so that a machine that slows down slows all of them. rounds: runs of each way.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(max(rounds.values())):
        for name, way in ways.items():
            if turn < rounds[name]:
                start = time.perf_counter()
                way()
                taken[name].append(time.perf_counter() - start)
    return {name: spread(seconds) for name, seconds in taken.items()}


def beside(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of two runs of each way."""
    return {name: one["median"] for name, one in interleaved(ways, dict.fromkeys(ways, 2)).items()}


class Phases:
    """Does the parts of a bench one after the other, says how long each took, and keeps their seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def do(self, name: str, work: Callable[[], T]) -> T:
        """The result of `work`."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        logger.info(f"{name} took {self.seconds[name]:.0f} s, {sum(self.seconds.values()):.0f} s since the start")
        return result


def rate(seconds: Mapping[str, float]) -> float:
    """Pieces per second, from the seconds that so many pieces take: what the most take more than the fewest."""
    counts = sorted(seconds, key=int)
    return (int(counts[-1]) - int(counts[0])) / (seconds[counts[-1]] - seconds[counts[0]])


def spread(values: list[float]) -> Range:
    """Median with what it lies between."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "runs": float(len(values)),
    }


def bandwidth(megabytes: int = 512, runs: int = 5) -> float:
    """Bytes per second that all threads together read from memory: the best of some sums over a large tensor."""
    data = torch.ones(megabytes * 2**18)  # float32: four bytes
    best = min(_seconds(data.sum) for _ in range(runs))
    return data.numel() * data.element_size() / best


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget_peak() -> int:
    """Let the kernel count this process's peak anew, from what it holds now, which is returned in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most this process has held since `forget_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (found,) = [line.split() for line in lines if line.startswith(f"{name}:")]
    return int(found[1]) * 1024  # the kernel counts in KiB


def peaks(command: Sequence[str], kinds: Sequence[str]) -> dict[str, dict[str, int]]:
    """What `command` with each kind behind it prints as its last line, a JSON object, each in a process of its own."""
    found = {}
    for kind in kinds:
        said = subprocess.run([*command, kind], check=True, stdout=subprocess.PIPE, text=True).stdout
        found[kind] = json.loads(said.splitlines()[-1])
    return found

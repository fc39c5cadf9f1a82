"""What a run costs: where the seconds of a step go, images and tokens per second, memory, use of the device."""

import resource
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

WINDOW = 20  # steps that figures are taken over
# Dense bfloat16 multiply-adds of makers' data sheets, in operations per second, by a part of the device's name.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class StepTimer:
    """Seconds by name within one step. On a GPU they are those of its own work, read once the step is done."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """The seconds since the last reading."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000.0
            self._events.clear()
        found = dict(self._seconds)
        self._seconds.clear()
        return found


def peak_flops(device: torch.device) -> float | None:
    """Operations per second the device's maker states for bfloat16; None where it is not in the list above."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most: of its GPU, or without one resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count anew from here; the system's count for a process cannot be set back, and stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Throughput:
    """Figures over the last steps.

    ranks: how many work like this one. flops_per_image: operations of forward and backward without what is computed
    again to save memory; 0 where not known. peak: operations per second of a device, None where not known.
    """

    def __init__(self, device: torch.device, ranks: int, flops_per_image: float = 0.0) -> None:
        self.device, self.ranks, self.flops_per_image = device, ranks, flops_per_image
        self.peak = peak_flops(device)
        self._steps: deque[tuple[float, int, int, dict[str, float]]] = deque(maxlen=WINDOW)

    def add(self, seconds: float, micro_batches: Sequence[Any], spent: dict[str, float]) -> None:
        """Take in a step of this rank: how long it took, what it was made of, and on what the time was spent."""
        images = sum(len(getattr(batch, "info", ())) for batch in micro_batches)
        masks = [batch.attention_mask for batch in micro_batches if hasattr(batch, "attention_mask")]
        self._steps.append((seconds, images, sum(int(mask.sum()) for mask in masks), spent))

    def seconds(self) -> float:
        """Of a step, on average; 0 before the first."""
        return sum(step[0] for step in self._steps) / max(len(self._steps), 1)

    def metrics(self) -> dict[str, float]:
        """By the names of their curves."""
        if not self._steps:
            return {}
        seconds = sum(step[0] for step in self._steps)
        images = self.ranks * sum(step[1] for step in self._steps) / seconds
        found = {
            "speed/images_per_second": images,
            "speed/tokens_per_second": self.ranks * sum(step[2] for step in self._steps) / seconds,
            "memory/peak_gib": peak_memory(self.device),
        }
        names = sorted({name for step in self._steps for name in step[3]})
        split = {name: sum(step[3].get(name, 0.0) for step in self._steps) / len(self._steps) for name in names}
        split["other"] = max(0.0, seconds / len(self._steps) - sum(split.values()))
        found |= {f"seconds/{name}": value for name, value in split.items()}
        if self.peak and self.flops_per_image:
            found["speed/mfu"] = images / self.ranks * self.flops_per_image / self.peak
        return found

    def describe(self) -> str:
        """For the console."""
        found = self.metrics()
        if not found:
            return ""
        parts = []
        if found["speed/images_per_second"]:
            parts.append(f"{found['speed/images_per_second']:.1f} pic/s")
        if found["speed/tokens_per_second"]:
            parts.append(f"{found['speed/tokens_per_second']:.0f} tok/s")
        if "speed/mfu" in found:
            parts.append(f"mfu {found['speed/mfu']:.0%}")
        return " ".join(parts)

    def summary(self) -> str:
        """One sentence at the end of a run."""
        found = self.metrics()
        if not found:
            return ""
        spent = {name.partition("/")[2]: value for name, value in found.items() if name.startswith("seconds/")}
        split = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in spent.items())
        peak = f"peak {found['memory/peak_gib']:.2f} GiB"
        return f"a step of the last {len(self._steps)}: {'; '.join(filter(None, (split, self.describe(), peak)))}"


def profiler(folder: Path, steps: int) -> AbstractContextManager[Any]:
    """A profiler for the `steps` steps after the first two, whose trace goes into `folder`/trace; nothing for 0."""
    if steps == 0:
        return nullcontext()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "trace")),
        record_shapes=True,
    )

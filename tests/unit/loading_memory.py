"""Load a folder in a process of its own and tell how much anonymous memory that took, in bytes, at the most.

python loading_memory.py VERSION TOWER DTYPE
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from utils.checkpoints.builder import build_model

KIB = 1024
PAUSE = 0.002

Made = TypeVar("Made")


def anonymous() -> int:
    """Anonymous memory of this process now, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KIB
    raise RuntimeError("/proc/self/status has no RssAnon: this is not Linux")


def most_above_before(build: Callable[[], Made]) -> tuple[Made, int]:
    """What `build` makes, and the most anonymous memory meanwhile, in bytes above that before."""
    torch.ones(8, 8) @ torch.ones(8, 8)  # what torch's first product sets up is not the model's
    before, highest, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous())
            time.sleep(PAUSE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    built = build()
    done.set()
    watcher.join()
    # On a busy machine the watcher may have come to its turn too seldom.
    return built, max(highest, anonymous()) - before


def main() -> None:
    version, tower, dtype = sys.argv[1:]
    built, most = most_above_before(lambda: build_model(version, tower or None, dtype=getattr(torch, dtype)))
    kinds = {str(parameter.dtype) for parameter in built.model.parameters()}
    print(most, *sorted(kinds))


if __name__ == "__main__":
    main()

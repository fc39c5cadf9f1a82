"""Run under a launcher: build a model as train_ds.py does, and tell the most anonymous memory that took on this rank.

sharded_memory.py OUT FLAGS...
"""

import sys
import threading
import time
from pathlib import Path

import torch

import train_ds
from tests.unit.loading_memory import PAUSE, anonymous
from utils.arguments import parse_train
from utils.engine.runtime import open_runtime
from utils.engine.setup import sharder
from utils.engine.stepping import numbers_in


def main() -> None:
    out, *flags = sys.argv[1:]
    args = parse_train(flags)
    runtime = open_runtime(args.engine, args.local_rank, args.precision)
    settle = sharder(args, runtime)
    torch.ones(8, 8) @ torch.ones(8, 8)  # what torch's first product sets up is not the model's
    before, highest, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous())
            time.sleep(PAUSE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    built, _ = train_ds.build(args, settle)
    done.set()
    watcher.join()
    highest = max(highest, anonymous())
    numbers = sum(numbers_in(parameter) for parameter in built.model.parameters())
    Path(f"{out}.rank{runtime.rank}").write_text(f"{highest - before} {numbers}")


if __name__ == "__main__":
    main()

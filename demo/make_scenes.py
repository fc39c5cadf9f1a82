"""Draw scenes of coloured shapes and write them, questions included, as a data root of official formats.

python -m demo.make_scenes --out runs/demo/dataset --train 6000 --heldout 600 --questions 1000 --size 112 --seed 0
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from demo.scenes import SceneDataSettings, SceneSettings, write_scene_data


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="data root to make; must not hold such data already")
    parser.add_argument("--train", type=int, default=6000, help="number of training scenes")
    parser.add_argument("--heldout", type=int, default=600, help="number of held-out scenes")
    parser.add_argument("--questions", type=int, default=1000, help="number of held-out questions")
    parser.add_argument("--size", type=int, default=112, help="side of the square images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--conversations", type=int, default=5, help="conversations in words per training image")
    return parser.parse_args(argv)


def show_progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """A progress bar around a loop."""
    return tqdm(items, total=total, desc=what)


def main(argv: list[str] | None = None) -> int:
    """Write the data; returns the exit status."""
    args = parse_arguments(argv)
    started = time.perf_counter()
    try:
        settings = SceneDataSettings(
            train=args.train,
            heldout=args.heldout,
            questions=args.questions,
            seed=args.seed,
            scene=SceneSettings(side=args.size),
            conversations=args.conversations,
        )
        summary = write_scene_data(args.out, settings, show_progress)
    except (ValueError, OSError) as error:
        print(f"make_scenes: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary | {"seconds": round(time.perf_counter() - started, 1)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

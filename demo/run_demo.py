"""The whole road on one command: draw data, make a base, train, export, score, ask. `make demo` runs it.

python demo/run_demo.py --size full      what runs/demo/summary.json is held to: a quarter of an hour on two cores
python demo/run_demo.py --size smoke     the same road in a minute or two; its model learns next to nothing
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.pipeline import BARS, SCORES, SIZES, Demo
from demo.scenes import HELD_OUT_SPEC
from demo.scoreboard import compare, missed, table
from demo.stages import Stage, StageFailed, Stages, choose_engine
from utils.cli.atomic_files import write_json
from utils.cli.errors import run_script


def run(demo: Demo) -> dict[str, Any]:
    """Run all stages and return the summary. StageFailed when one of them does not end well."""
    stages, baselines = Stages(demo.count()), dict[str, float]()
    for stage in demo.stages():
        if isinstance(stage, Stage):
            stages.run(stage)
        else:
            with stages.timed(stage, "nothing held out is trained on, and the questions are hard enough"):
                leak, difficulty = demo.check()
                print(f"    {leak.images_held_out} images held out, {leak.images_trained_on} others trained on")
                print("    " + ", ".join(f"{share:.0%} {kind}" for kind, share in difficulty.shares.items()))
                baselines = difficulty.baselines
    seconds = {name: round(value, 1) for name, value in (stages.seconds | {"total": stages.total()}).items()}
    scores = json.loads((demo.evaluation / "results.json").read_text(encoding="utf-8"))
    shutil.copy(demo.evaluation / "gallery.png", demo.out)
    return {name: scores[name] for name in SCORES} | {
        "baselines": baselines,
        "engine": demo.engine,
        "model": str(demo.model),
        "dataset_dir": str(demo.dataset_dir),
        "val_dataset": HELD_OUT_SPEC,
        "seconds": seconds,
    }


def report(demo: Demo, summary: dict[str, Any]) -> int:
    """Print the table; returns the exit status: 1 when a demo that is held to its bars misses one."""
    rows = compare(summary, BARS)
    print(f"\nScores on {summary['n']} questions about images the model never saw ({demo.engine} engine):\n")
    print(table(rows, with_bars=demo.size.held_to_bars))
    print(f"\nSee {demo.out}/summary.json, answer.png and gallery.png. To ask it yourself:")
    print(f"  {sys.executable} chat.py --version {demo.model}")
    misses = missed(rows) if demo.size.held_to_bars else []
    for sentence in misses:
        print(f"demo: missed: {sentence}", file=sys.stderr)
    return 1 if misses else 0


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status, that of the stage where one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    args = parser.parse_args(argv)
    demo = Demo(SIZES[args.size], ROOT, (ROOT / args.out).resolve(), choose_engine())
    demo.clear()
    try:
        summary = run(demo)
    except StageFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        raise KeyboardInterrupt("demo: interrupted; nothing of it is left running") from None
    write_json(demo.out / "summary.json", summary)
    return report(demo, summary)


if __name__ == "__main__":
    sys.exit(run_script(main))

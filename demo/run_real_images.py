"""Train on real images until their referring sentences are known by heart, and score that. `make real-images`.

PIXELLM_REALDATA=FOLDER python demo/run_real_images.py      FOLDER/dataset is the data root
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.pipeline import SCORES
from demo.real_images import BARS, LEARNED_SPEC, VARIABLE, RealImages, find_dataset
from demo.scenes import tokenizer_corpus
from demo.scoreboard import compare, missed, table
from demo.stages import Stage, StageFailed, Stages, choose_engine
from demo.tiny import TinyShape, make_tiny
from utils.checkpoints.builder import MASK_PARTS, save_model
from utils.cli.atomic_files import write_json
from utils.cli.errors import run_script

SEED = 0


def find_base(asked: Path | None) -> Path | None:
    """The base that was asked for, or the one `make demo` left; None when there is neither."""
    made = ROOT / "runs" / "demo" / "base"
    return asked or (made if (made / "config.json").is_file() else None)


def run(plan: RealImages) -> dict[str, Any]:
    """Run all stages and return the summary. StageFailed when one of them does not end well."""
    stages = Stages(plan.count())
    for stage in plan.stages():
        if isinstance(stage, Stage):
            stages.run(stage)
        else:
            with stages.timed(stage, "a tiny model with random weights, as no demo left a base"):
                built = make_tiny(tokenizer_corpus(), TinyShape(), SEED)
                save_model(built.model, built.processor, plan.base, left_out=MASK_PARTS)
    seconds = {name: round(value, 1) for name, value in (stages.seconds | {"total": stages.total()}).items()}
    scores = json.loads((plan.evaluation / "results.json").read_text(encoding="utf-8"))
    shutil.copy(plan.evaluation / "gallery.png", plan.out)
    return {name: scores[name] for name in SCORES} | {
        "engine": plan.engine,
        "base": str(plan.base) if plan.version else "random weights",
        "model": str(plan.model),
        "dataset_dir": str(plan.dataset_dir),
        "val_dataset": LEARNED_SPEC,
        "seconds": seconds,
    }


def report(plan: RealImages, summary: dict[str, Any]) -> int:
    """Print the table; returns the exit status: 1 when a bar is missed."""
    rows = compare(summary, BARS)
    print(f"\nScores on the {summary['n']} questions about real images it was taught ({plan.engine} engine):\n")
    print(table(rows))
    print(f"\nSee {plan.out}/summary.json and gallery.png.")
    for sentence in missed(rows):
        print(f"real-images: missed: {sentence}", file=sys.stderr)
    return 1 if missed(rows) else 0


def main(argv: list[str] | None = None) -> int:
    """Train and score; returns the exit status, that of the stage where one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real_images"), help="folder for everything it makes")
    parser.add_argument("--version", type=Path, help="tiny base to enlarge; else runs/demo/base, else random weights")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; 0: as configs/real_images.yaml says")
    parser.add_argument("--engine", choices=("deepspeed", "plain"), help="who trains; else DeepSpeed where it can run")
    args = parser.parse_args(argv)
    dataset, base = find_dataset(os.environ.get(VARIABLE)), find_base(args.version)
    out, engine = (ROOT / args.out).resolve(), args.engine or choose_engine()
    plan = RealImages(ROOT, out, dataset, engine, args.steps, base.resolve() if base else None)
    plan.clear()
    try:
        summary = run(plan)
    except StageFailed as error:
        print(f"real-images: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        raise KeyboardInterrupt("real-images: interrupted; nothing of it is left running") from None
    write_json(plan.out / "summary.json", summary)
    return report(plan, summary)


if __name__ == "__main__":
    sys.exit(run_script(main))

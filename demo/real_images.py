"""Train on real images until their referring sentences are known by heart, and score that. `make real-images`.

PIXELLM_REALDATA=FOLDER python -m demo.real_images      FOLDER/dataset is the data root
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from demo.pipelines import ROOT, Pipeline, run_pipeline
from demo.scenes import tokenizer_corpus
from demo.stages import Stage, Stages, choose_engine
from demo.tiny import TinyShape, make_tiny
from utils.checkpoints.builder import MASK_PARTS, save_model
from utils.cli.errors import UserError, run_script
from utils.data.files import REAL_DATA
from utils.evaluation.thresholds import Expectations, Threshold

SEED = 0
LEARNED_SPEC = "refcoco|unc|train||grefcoco|unc|train"
# In tokens; the true answers have up to 60.
LONGEST_ANSWER = 96
THRESHOLDS: Expectations = (
    Threshold("giou", ">=", 0.70),
    Threshold("giou_shuffled", "<=", 0.40),
    "giou_teacher_forced",
    "ciou",
    "target_count_accuracy",
    "text_accuracy",
    "n",
    Threshold("seconds.total", "<=", 900),
)


def find_dataset(folder: str | None) -> Path:
    """The data root with the real images. UserError when there is none.

    folder: the value of the environment variable REAL_DATA; None or empty when it is not set.
    """
    if not folder:
        raise UserError(f"{REAL_DATA} is not set: give it the folder that holds dataset/ with the real images")
    root = Path(folder).expanduser().resolve() / "dataset"
    if not root.is_dir():
        raise UserError(f"{REAL_DATA} is {folder!r}, but there is no {root}: expected the data root with real images")
    return root


def find_base(given: Path | None) -> Path | None:
    """The base that was given, or the one `make demo` left; None when there is neither."""
    made = ROOT / "runs" / "demo" / "base"
    return given or (made if (made / "config.json").is_file() else None)


@dataclass(frozen=True)
class RealImages(Pipeline):
    """One such run.

    dataset_dir: the data root. steps: optimizer steps; 0 for those of the config. version: the tiny base to enlarge;
    None for one with random weights.
    """

    name: ClassVar[str] = "real-images"
    thresholds: ClassVar[Expectations] = THRESHOLDS

    dataset_dir: Path
    steps: int = 0
    version: Path | None = None

    @property
    def base(self) -> Path:
        """See `Pipeline.base`."""
        return self.version or super().base

    def stages(self) -> Iterator[Stage | str]:
        """See `Pipeline.stages`; "base" writes a base with random weights."""
        data, base = str(self.dataset_dir), str(self.base)
        if self.version is None:
            yield "base"
        train = ("--config", "configs/runs/real_images.yaml", "--version", base, "--dataset_dir", data)
        few = ("--max_steps", str(self.steps)) if self.steps else ()
        yield from self.train_and_merge("enlarge the base and train it", *train, *few)
        ask = ("--version", str(self.model), "--max_new_tokens", str(LONGEST_ANSWER), "--dataset_dir", data)
        score = ("evaluate.py", *ask, "--val_dataset", LEARNED_SPEC, "--out", str(self.evaluation))
        yield self.stage("evaluate", "ask everything it was taught", *score)

    def count(self) -> int:
        """See `Pipeline.count`."""
        return 3 + (self.version is None) + (self.engine == "deepspeed")

    def run_step(self, name: str, stages: Stages) -> None:
        """Write a base with random weights."""
        with stages.timed(name, "a tiny model with random weights, as no demo left a base"):
            built = make_tiny(tokenizer_corpus(), TinyShape(), SEED)
            save_model(built.model, built.processor, self.base, left_out=MASK_PARTS)

    def describe(self) -> dict[str, Any]:
        """See `Pipeline.describe`."""
        return {
            "base": str(self.base) if self.version else "random weights",
            "dataset_dir": str(self.dataset_dir),
            "val_dataset": LEARNED_SPEC,
        }

    def headline(self, summary: Mapping[str, Any]) -> str:
        """See `Pipeline.headline`."""
        return f"Scores on the {summary['n']} questions about real images it was taught ({self.engine} engine):"

    def goodbye(self) -> str:
        """See `Pipeline.goodbye`."""
        return f"See {self.out}/summary.json and gallery.png."


def main(argv: list[str] | None = None) -> int:
    """Train and score; returns the exit status, that of the stage where one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real_images"), help="folder for everything it makes")
    parser.add_argument("--version", type=Path, help="tiny base to enlarge; else runs/demo/base, else random weights")
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps; 0: as configs/runs/real_images.yaml says"
    )
    parser.add_argument("--engine", choices=("deepspeed", "plain"), help="who trains; else DeepSpeed where it can run")
    args = parser.parse_args(argv)
    dataset, base = find_dataset(os.environ.get(REAL_DATA)), find_base(args.version)
    out, engine = (ROOT / args.out).resolve(), args.engine or choose_engine()
    return run_pipeline(RealImages(out, engine, dataset, args.steps, base.resolve() if base else None))


if __name__ == "__main__":
    sys.exit(run_script(main))

"""The demo: draw data, make a base, train, export, score, ask. `make demo` runs it.

python -m demo --size full      about a quarter of an hour on two cores; its scores must reach the thresholds below
python -m demo --size smoke     the same stages in a minute or two; its model learns next to nothing
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from demo.pipelines import RANKS, ROOT, Pipeline, run_pipeline
from demo.scenes import HELD_OUT_SPEC, check_difficulty, check_no_leak
from demo.stages import Stage, Stages, choose_engine
from utils.cli.errors import run_script
from utils.data.readers.registry import build_eval_reader
from utils.data.samples import DIRECT, REASONING, SEVERAL
from utils.evaluation.thresholds import Expectations, Threshold

THRESHOLDS: Expectations = (
    Threshold("giou", ">=", 0.78),
    Threshold("giou_by_kind.direct", ">=", 0.85),
    Threshold("giou_by_kind.several", ">=", 0.75),
    Threshold("giou_by_kind.reasoning", ">=", 0.50),
    Threshold("giou_by_kind.no_target", ">=", 0.90),
    Threshold("target_count_accuracy", ">=", 0.95),
    "text_accuracy",
    "ciou",
    "giou_teacher_forced",
    Threshold("giou_shuffled", "<=", 0.40),
    Threshold("baselines.mask everything", "<", 0.40),
    Threshold("baselines.largest shape", "<", 0.40),
    Threshold("n", ">=", 1000),
    Threshold("seconds.total", "<=", 900),
)


@dataclass(frozen=True)
class Size:
    """How large a demo is.

    data, base, train: flags for these stages. questions: how many held-out ones. longest_answer: in tokens, when asked;
    the true ones have up to 57. with_thresholds: missing one fails the demo.
    """

    data: tuple[str, ...]
    base: tuple[str, ...]
    train: tuple[str, ...]
    questions: int
    longest_answer: int
    with_thresholds: bool


_FEW_STEPS = ("--max_steps", "6", "--warmup_steps", "2")
SIZES = {
    "full": Size(
        data=("--train", "6000", "--heldout", "600"),
        base=(),
        train=(),
        questions=1000,
        longest_answer=96,
        with_thresholds=True,
    ),
    "smoke": Size(
        data=("--train", "60", "--heldout", "50"),
        base=("--tower_steps", "6", "--sentence_steps", "4", "--samples", "40", "--words", *_FEW_STEPS),
        train=(*_FEW_STEPS, "--val_limit", "8", "--max_new_tokens", "24"),
        questions=100,
        longest_answer=24,
        with_thresholds=False,
    ),
}


@dataclass(frozen=True)
class Demo(Pipeline):
    """One demo."""

    name: ClassVar[str] = "demo"
    thresholds: ClassVar[Expectations] = THRESHOLDS
    made: ClassVar[tuple[str, ...]] = ("dataset", "base_work", "chat", *Pipeline.made)

    size: Size
    baselines: dict[str, float]
    """Scores of answers that do not read the question, filled by the check of the data."""

    @property
    def dataset_dir(self) -> Path:
        """The data root that is drawn."""
        return self.out / "dataset"

    def stages(self) -> Iterator[Stage | str]:
        """See `Pipeline.stages`; "check" looks at the drawn data."""
        size, data, base, model = self.size, str(self.dataset_dir), str(self.base), str(self.model)
        questions = ("--dataset_dir", data, "--val_dataset", HELD_OUT_SPEC)
        draw = ("-m", "demo.make_scenes", "--out", data, "--questions", str(size.questions), *size.data)
        yield self.stage("data", "draw scenes and ask about them", *draw)
        yield "check"
        together = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS))
        make_base = ("-m", "demo.make_base", "--dataset_dir", data, "--out", base, *size.base)
        yield self.stage("base", "teach a new model such scenes in words", *together, *make_base)
        train = ("--config", "configs/tiny.yaml", "--version", base, *questions, *size.train)
        yield from self.train_and_merge("train a PixelLM on that base", *train)
        ask = ("--version", model, "--max_new_tokens", str(size.longest_answer))
        evaluate = ("evaluate.py", *ask, *questions, "--batch_size", "32", "--out", str(self.evaluation))
        yield self.stage("evaluate", "ask about images it never saw", *together, *evaluate)
        image, asked = self.choose_questions()
        chat = ("chat.py", *ask, "--image", image, "--echo", "--vis_save_path", str(self.out / "chat"))
        lines = [asked[0], f"/save {self.out / 'answer.png'}", *asked[1:]]
        yield replace(self.stage("chat", "talk about one image", *chat), typed="\n".join(lines) + "\n")

    def count(self) -> int:
        """See `Pipeline.count`."""
        return 8 if self.engine == "deepspeed" else 7

    def run_step(self, name: str, stages: Stages) -> None:
        """Refuse (DataError) drawn data whose held-out images are trained on, or whose questions are too easy."""
        with stages.timed(name, "nothing held out is trained on, and the questions are hard enough"):
            samples = build_eval_reader(HELD_OUT_SPEC, self.dataset_dir)
            leak = check_no_leak(self.dataset_dir)
            difficulty = check_difficulty(self.dataset_dir, samples, self.size.questions)
            print(f"    {leak.images_held_out} images held out, {leak.images_trained_on} others trained on")
            print("    " + ", ".join(f"{share:.0%} {kind}" for kind, share in difficulty.shares.items()))
            self.baselines.update(difficulty.baselines)

    def describe(self) -> dict[str, Any]:
        """See `Pipeline.describe`."""
        return {
            "baselines": self.baselines,
            "dataset_dir": str(self.dataset_dir),
            "val_dataset": HELD_OUT_SPEC,
        }

    def headline(self, summary: Mapping[str, Any]) -> str:
        """See `Pipeline.headline`."""
        return f"Scores on {summary['n']} questions about images the model never saw ({self.engine} engine):"

    def goodbye(self) -> str:
        """See `Pipeline.goodbye`."""
        return (
            f"See {self.out}/summary.json, answer.png and gallery.png. To ask it yourself:\n"
            f"  {sys.executable} chat.py --version {self.model}"
        )

    def choose_questions(self) -> tuple[str, list[str]]:
        """A held-out image with what is asked about it: first for several targets, then something else.

        The targets have different names, so that whoever looks at the answer sees which mask is meant to be which.
        """
        asked: dict[str, dict[str, str]] = {}  # by image and kind, over all sets: each knows some kinds only
        for sample in build_eval_reader(HELD_OUT_SPEC, self.dataset_dir):
            for (turn,) in sample.conversations:
                if len({target.name for target in turn.targets}) == len(turn.targets):
                    asked.setdefault(sample.image_path, {}).setdefault(turn.kind, turn.question)
        for image, by_kind in asked.items():
            others = [by_kind[kind] for kind in (REASONING, DIRECT) if kind in by_kind]
            if SEVERAL in by_kind and others:
                return image, [by_kind[SEVERAL], *others]
        raise LookupError("no held-out image is asked about for several targets and for something else")

    def clear(self) -> None:
        """See `Pipeline.clear`."""
        super().clear()
        for image in self.out.glob("answer*.png"):
            image.unlink()


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status, that of the stage where one failed."""
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    return run_pipeline(Demo((ROOT / args.out).resolve(), choose_engine(), size, {}), size.with_thresholds)


if __name__ == "__main__":
    sys.exit(run_script(main))

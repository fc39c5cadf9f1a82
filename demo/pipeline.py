"""The demo: which stages lead from nothing to a scored model that answers, and what its scores are held to."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from demo.scenes import HELD_OUT_SPEC, Difficulty, LeakReport, check_difficulty, check_no_leak
from demo.scoreboard import Bar, Bars
from demo.stages import Stage, launcher
from utils.data.readers.registry import build_eval_reader
from utils.data.samples import DIRECT, REASONING, SEVERAL

RANKS = 2
# What the summary takes over from the results that evaluation writes.
SCORES = (
    *("giou", "ciou", "giou_teacher_forced", "giou_by_kind", "giou_shuffled"),
    *("target_count_accuracy", "text_accuracy", "n"),
)
BARS: Bars = (
    Bar("giou", ">=", 0.78),
    Bar("giou_by_kind.direct", ">=", 0.85),
    Bar("giou_by_kind.several", ">=", 0.75),
    Bar("giou_by_kind.reasoning", ">=", 0.50),
    Bar("giou_by_kind.no_target", ">=", 0.90),
    Bar("target_count_accuracy", ">=", 0.95),
    "text_accuracy",
    "ciou",
    "giou_teacher_forced",
    Bar("giou_shuffled", "<=", 0.40),
    Bar("baselines.mask everything", "<", 0.40),
    Bar("baselines.largest shape", "<", 0.40),
    Bar("n", ">=", 1000),
    Bar("seconds.total", "<=", 900),
)


@dataclass(frozen=True)
class Size:
    """How large a demo is.

    data, base, train: flags for these stages. questions: how many held-out ones. longest_answer: in tokens, when asked;
    the true ones have up to 57. held_to_bars: missing a bar fails the demo.
    """

    data: tuple[str, ...]
    base: tuple[str, ...]
    train: tuple[str, ...]
    questions: int
    longest_answer: int
    held_to_bars: bool


SIZES = {
    "full": Size(
        data=("--train", "6000", "--heldout", "600"),
        base=(),
        train=(),
        questions=1000,
        longest_answer=96,
        held_to_bars=True,
    ),
    "smoke": Size(
        data=("--train", "60", "--heldout", "50"),
        base=(
            "--tower_steps",
            "6",
            "--sentence_steps",
            "4",
            "--samples",
            "40",
            "--words",
            "--max_steps",
            "6",
            "--warmup_steps",
            "2",
        ),
        train=("--max_steps", "6", "--warmup_steps", "2", "--val_limit", "8", "--max_new_tokens", "24"),
        questions=100,
        longest_answer=24,
        held_to_bars=False,
    ),
}


@dataclass(frozen=True)
class Demo:
    """One demo. repository: where the scripts are. out: the folder everything is written to. engine: who trains."""

    size: Size
    repository: Path
    out: Path
    engine: str

    @property
    def dataset_dir(self) -> Path:
        """The data root that is drawn."""
        return self.out / "dataset"

    @property
    def model(self) -> Path:
        """The exported folder."""
        return self.out / "model"

    @property
    def evaluation(self) -> Path:
        """The folder evaluation writes its results.json and gallery.png to."""
        return self.out / "evaluation"

    def stage(self, name: str, title: str, *command: str, threads: int = 1, cwd: Path | None = None) -> Stage:
        """A stage that runs a script of the repository (of `cwd` where given), or a program named by its full path.

        One thread is nearly as fast as two on so small a model, and far faster when the machine has other work.
        """
        program = command if os.path.isabs(command[0]) else (sys.executable, *command)
        return Stage(name, title, program, cwd or self.repository, {"OMP_NUM_THREADS": str(threads)})

    def stages(self) -> Iterator[Stage | str]:
        """The stages in order, each reading only what those before it left under `out`; "check" stands for `check`."""
        size, data, base, model = self.size, str(self.dataset_dir), str(self.out / "base"), str(self.model)
        run, ranks = self.out / "pixellm", RANKS if self.engine == "deepspeed" else 1
        questions = ("--dataset_dir", data, "--val_dataset", HELD_OUT_SPEC)
        draw = ("demo/make_scenes.py", "--out", data, "--questions", str(size.questions), *size.data)
        yield self.stage("data", "draw scenes and ask about them", *draw)
        yield "check"
        together = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS))
        make_base = ("demo/make_base.py", "--dataset_dir", data, "--out", base, *size.base)
        yield self.stage("base", "teach a new model such scenes in words", *together, *make_base)
        train = ("train_ds.py", "--config", "configs/tiny.yaml", "--version", base, *questions, *size.train)
        where = ("--log_base_dir", str(self.out), "--exp_name", run.name, "--engine", self.engine)
        # One process takes both ranks' images of a step, one after the other.
        rounds = () if ranks == RANKS else ("--grad_accumulation_steps", str(RANKS))
        launched = (*launcher(self.engine, ranks), *train, *where, *rounds)
        yield self.stage("train", "train a PixelLM on that base", *launched, threads=RANKS // ranks)
        weight = run / "ckpt_model"
        if self.engine == "deepspeed":
            collect = ("zero_to_fp32.py", ".", "../pytorch_model.bin")
            yield self.stage("zero_to_fp32", "collect the ranks' parts of the weights", *collect, cwd=weight)
            weight = run / "pytorch_model.bin"
        merge = ("merge_lora_weights_and_save_hf_model.py", "--version", base, "--weight", str(weight))
        yield self.stage("merge", "write one Hugging Face folder", *merge, "--save_path", model)
        ask = ("--version", model, "--max_new_tokens", str(size.longest_answer))
        evaluate = ("evaluate.py", *ask, *questions, "--batch_size", "32", "--out", str(self.evaluation))
        yield self.stage("evaluate", "ask about images it never saw", *together, *evaluate)
        image, asked = self.talk()
        chat = ("chat.py", *ask, "--image", image, "--echo", "--vis_save_path", str(self.out / "chat"))
        lines = [asked[0], f"/save {self.out / 'answer.png'}", *asked[1:]]
        yield replace(self.stage("chat", "talk about one image", *chat), typed="\n".join(lines) + "\n")

    def count(self) -> int:
        """How many stages there are."""
        return 8 if self.engine == "deepspeed" else 7

    def check(self) -> tuple[LeakReport, Difficulty]:
        """Refuse (DataError) drawn data whose held-out images are trained on, or whose questions are too easy."""
        samples = build_eval_reader(HELD_OUT_SPEC, self.dataset_dir)
        return check_no_leak(self.dataset_dir), check_difficulty(self.dataset_dir, samples, self.size.questions)

    def talk(self) -> tuple[str, list[str]]:
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
        """Remove what an earlier demo left, and nothing else."""
        for name in ("dataset", "base", "base_work", "pixellm", "model", "evaluation", "chat"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in ("summary.json", "gallery.png"):
            (self.out / name).unlink(missing_ok=True)
        for image in self.out.glob("answer*.png"):
            image.unlink()

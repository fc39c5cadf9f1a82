"""Training on real images, kinds of data mixed, until the referring sentences of the training split are known."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo.pipeline import RANKS
from demo.scoreboard import Bar, Bars
from demo.stages import Stage, launcher
from utils.cli.errors import UserError

VARIABLE = "PIXELLM_REALDATA"
LEARNED_SPEC = "refcoco|unc|train||grefcoco|unc|train"
# In tokens; the true answers have up to 60.
LONGEST_ANSWER = 96
BARS: Bars = (
    Bar("giou", ">=", 0.70),
    Bar("giou_shuffled", "<=", 0.40),
    "giou_teacher_forced",
    "ciou",
    "target_count_accuracy",
    "text_accuracy",
    "n",
    Bar("seconds.total", "<=", 900),
)


def find_dataset(named: str | None) -> Path:
    """The data root with the real images. UserError when VARIABLE does not lead to one.

    named: the value of the environment variable; None or empty when it is not set.
    """
    if not named:
        raise UserError(f"{VARIABLE} is not set: give it the folder that holds dataset/ with the real images")
    root = Path(named).expanduser().resolve() / "dataset"
    if not root.is_dir():
        raise UserError(f"{VARIABLE} is {named!r}, but there is no {root}: expected the data root with real images")
    return root


@dataclass(frozen=True)
class RealImages:
    """One such run.

    repository: where the scripts are. out: the folder everything is written to. dataset_dir: the data root. engine: who
    trains. steps: optimizer steps; 0 for those of the config. version: the tiny base to enlarge; None for one with
    random weights.
    """

    repository: Path
    out: Path
    dataset_dir: Path
    engine: str
    steps: int = 0
    version: Path | None = None

    @property
    def base(self) -> Path:
        """The folder that is enlarged and trained."""
        return self.version or self.out / "base"

    @property
    def model(self) -> Path:
        """The exported folder."""
        return self.out / "model"

    @property
    def evaluation(self) -> Path:
        """The folder evaluation writes its results.json and gallery.png to."""
        return self.out / "evaluation"

    def stage(self, name: str, title: str, *command: str, threads: int = 1, cwd: Path | None = None) -> Stage:
        """A stage that runs a script of the repository (of `cwd` where given), or a program named by its full path."""
        program = command if os.path.isabs(command[0]) else (sys.executable, *command)
        return Stage(name, title, program, cwd or self.repository, {"OMP_NUM_THREADS": str(threads)})

    def stages(self) -> Iterator[Stage | str]:
        """The stages in order; "base" stands for writing a base with random weights to `base`."""
        data, base, model, run = str(self.dataset_dir), str(self.base), str(self.model), self.out / "pixellm"
        ranks = RANKS if self.engine == "deepspeed" else 1
        if self.version is None:
            yield "base"
        train = ("train_ds.py", "--config", "configs/real_images.yaml", "--version", base, "--dataset_dir", data)
        where = ("--log_base_dir", str(self.out), "--exp_name", run.name, "--engine", self.engine)
        few = ("--max_steps", str(self.steps)) if self.steps else ()
        # One process takes both ranks' images of a step, one after the other.
        rounds = () if ranks == RANKS else ("--grad_accumulation_steps", str(RANKS))
        launched = (*launcher(self.engine, ranks), *train, *where, *few, *rounds)
        yield self.stage("train", "enlarge the base and train it", *launched, threads=RANKS // ranks)
        weight = run / "ckpt_model"
        if self.engine == "deepspeed":
            collect = ("zero_to_fp32.py", ".", "../pytorch_model.bin")
            yield self.stage("zero_to_fp32", "collect the ranks' parts of the weights", *collect, cwd=weight)
            weight = run / "pytorch_model.bin"
        merge = ("merge_lora_weights_and_save_hf_model.py", "--version", base, "--weight", str(weight))
        yield self.stage("merge", "write one Hugging Face folder", *merge, "--save_path", model)
        ask = ("--version", model, "--max_new_tokens", str(LONGEST_ANSWER), "--dataset_dir", data)
        score = ("evaluate.py", *ask, "--val_dataset", LEARNED_SPEC, "--out", str(self.evaluation))
        yield self.stage("evaluate", "ask everything it was taught", *score)

    def count(self) -> int:
        """How many stages there are."""
        return 3 + (self.version is None) + (self.engine == "deepspeed")

    def clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for name in ("base", "pixellm", "model", "evaluation"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in ("summary.json", "gallery.png"):
            (self.out / name).unlink(missing_ok=True)

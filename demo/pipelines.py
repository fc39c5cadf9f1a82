"""What the demo and the run on real images have in common: stages in one folder, a summary, thresholds.

Training, gathering, merging and evaluation go through the scripts a user would call, with the commands shown.
"""

import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from demo.stages import Stage, StageFailed, Stages, launcher
from utils.cli.atomic_files import write_json
from utils.evaluation.thresholds import Expectations, compare, format_table, list_misses

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
# What the summary takes over from the results that evaluation writes.
SCORES = (
    *("giou", "ciou", "giou_teacher_forced", "giou_by_kind", "giou_shuffled"),
    *("target_count_accuracy", "text_accuracy", "n"),
)


@dataclass(frozen=True)
class Pipeline(ABC):
    """A run made of stages. out: the folder everything is written to. engine: who trains.

    Subclasses say the stages, and what belongs into the summary beside scores and seconds.
    """

    name: ClassVar[str]
    thresholds: ClassVar[Expectations]
    made: ClassVar[tuple[str, ...]] = ("base", "pixellm", "model", "evaluation")
    """Folders in `out` that are made anew."""

    out: Path
    engine: str

    @property
    def base(self) -> Path:
        """The folder of the model that is trained."""
        return self.out / "base"

    @property
    def model(self) -> Path:
        """The exported folder."""
        return self.out / "model"

    @property
    def evaluation(self) -> Path:
        """The folder evaluation writes its results.json and gallery.png to."""
        return self.out / "evaluation"

    @abstractmethod
    def stages(self) -> Iterator[Stage | str]:
        """The stages in order, each reading only what those before it left; a name stands for `run_step`."""

    @abstractmethod
    def run_step(self, name: str, stages: Stages) -> None:
        """Run, timed by `stages`, a stage that is no command."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the summary says of this run beside scores and seconds."""

    @abstractmethod
    def headline(self, summary: Mapping[str, Any]) -> str:
        """The line above the table."""

    @abstractmethod
    def goodbye(self) -> str:
        """What stands below the table."""

    @abstractmethod
    def count(self) -> int:
        """How many stages there are."""

    def stage(self, name: str, title: str, *command: str, threads: int = 1, cwd: Path = ROOT) -> Stage:
        """A stage that runs a script of the repository (of `cwd` where given), or a program named by its full path.

        One thread is nearly as fast as two on so small a model, and far faster when the machine has other work.
        """
        program = command if os.path.isabs(command[0]) else (sys.executable, *command)
        return Stage(name, title, program, cwd, {"OMP_NUM_THREADS": str(threads)})

    def train_and_merge(self, title: str, *flags: str) -> Iterator[Stage]:
        """Train on `base` with these flags of train_ds.py and write the model's folder."""
        run, ranks = self.out / "pixellm", RANKS if self.engine == "deepspeed" else 1
        train = ("train_ds.py", *flags, "--log_base_dir", str(self.out), "--exp_name", run.name)
        # One process takes both ranks' images of a step, one after the other.
        rounds = () if ranks == RANKS else ("--grad_accumulation_steps", str(RANKS))
        launched = (*launcher(self.engine, ranks), *train, "--engine", self.engine, *rounds)
        yield self.stage("train", title, *launched, threads=RANKS // ranks)
        weight = run / "ckpt_model"
        if self.engine == "deepspeed":
            collect = ("zero_to_fp32.py", ".", "../pytorch_model.bin")
            yield self.stage("zero_to_fp32", "collect the ranks' parts of the weights", *collect, cwd=weight)
            weight = run / "pytorch_model.bin"
        merge = ("merge_lora_weights_and_save_hf_model.py", "--version", str(self.base), "--weight", str(weight))
        yield self.stage("merge", "write one Hugging Face folder", *merge, "--save_path", str(self.model))

    def clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for name in self.made:
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in ("summary.json", "gallery.png"):
            (self.out / name).unlink(missing_ok=True)

    def run(self) -> dict[str, Any]:
        """Run all stages and return the summary. StageFailed when one of them does not end well."""
        stages = Stages(self.count())
        for stage in self.stages():
            if isinstance(stage, Stage):
                stages.run(stage)
            else:
                self.run_step(stage, stages)
        seconds = {name: round(value, 1) for name, value in (stages.seconds | {"total": stages.total()}).items()}
        scores = json.loads((self.evaluation / "results.json").read_text(encoding="utf-8"))
        shutil.copy(self.evaluation / "gallery.png", self.out)
        facts = self.describe() | {"engine": self.engine, "model": str(self.model), "seconds": seconds}
        return {name: scores[name] for name in SCORES} | facts

    def report(self, summary: Mapping[str, Any], with_thresholds: bool = True) -> int:
        """Print the table; returns the exit status: 1 when a threshold that counts is missed."""
        rows = compare(summary, self.thresholds)
        print(f"\n{self.headline(summary)}\n\n{format_table(rows, with_thresholds)}\n\n{self.goodbye()}")
        misses = list_misses(rows) if with_thresholds else []
        for sentence in misses:
            print(f"{self.name}: missed: {sentence}", file=sys.stderr)
        return 1 if misses else 0


def run_pipeline(pipeline: Pipeline, with_thresholds: bool = True) -> int:
    """Run it and write summary.json; returns the exit status, that of the stage where one failed."""
    pipeline.clear()
    try:
        summary = pipeline.run()
    except StageFailed as error:
        print(f"{pipeline.name}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{pipeline.name}: interrupted; nothing of it is left running") from None
    write_json(pipeline.out / "summary.json", summary)
    return pipeline.report(summary, with_thresholds)

"""What the tests on a GPU do, for any device: a CPU runs the same, so that these steps are known to be sound."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from model.predictor import Predictor
from tests.smoke.conftest import ROOT, training_flags
from tests.unit.tiny_pixellm import noise

STEPS = 10
QUESTION = "Where is the red circle?"


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """The output of a command of this interpreter that must end well."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def train(base: Path, data: Path, out: Path, name: str, *flags: str, engine: str = "plain") -> Path:
    """STEPS optimizer steps; returns the run's folder."""
    every = [*training_flags(base, data, out, name), f"--max_steps={STEPS}", f"--engine={engine}"]
    run("train_ds.py", *every, "--grad_accumulation_steps=2", "--no_eval", *flags, env=os.environ.copy())
    return out / name


def weights_of(run_folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of the plain engine."""
    return torch.load(run_folder / "ckpt_model" / f"step{step}" / "pytorch_model.bin", weights_only=True)


def resumed_repeats(base: Path, data: Path, out: Path, *flags: str) -> list[str]:
    """Names of the weights that differ between a run in one go and one that is ended half way and goes on."""
    every = ("--deterministic", "--lr_schedule=constant", *flags)
    whole = weights_of(train(base, data, out, "whole", *every))
    train(base, data, out, "halves", *every, f"--max_steps={STEPS // 2}")
    halves = weights_of(train(base, data, out, "halves", *every))
    assert halves.keys() == whole.keys()
    return [name for name, value in whole.items() if not torch.equal(value, halves[name])]


def export(run_folder: Path, target: Path) -> Path:
    """Merge a run into one folder; needs no flag but where the weights are."""
    run(
        "merge_lora_weights_and_save_hf_model.py",
        f"--weight={run_folder / 'ckpt_model'}",
        f"--save_path={target}",
        "--precision=fp32",
    )
    return target


def answer(folder: Path, device: str, dtype: torch.dtype, attention: str = "sdpa", compiled: bool = False) -> str:
    """Ask an exported model one question about an image of noise; returns its words."""
    predictor = Predictor.from_pretrained(folder, device, dtype, attention)
    if compiled:
        predictor.compile()
    found = predictor.session(noise(40, 56)).ask(QUESTION, 12)
    assert found.masks.shape[1:] == (40, 56) and all(0 <= score <= 1 for score in found.scores)
    return found.text

"""Shared by the smoke tests: drawn data, a tiny base, and one training run under DeepSpeed with two ranks."""

import contextlib
import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import pytest

from demo.scenes import SceneSettings, write_scene_data
from demo.scenes.planning import SceneDataSettings
from tests.smoke.killing import Job, Outcome
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import save_model

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@dataclass(frozen=True)
class SmokeRun:
    """A training run: its folder (run.json, ckpt_model, ckpt_model_best), its base and data, and what it said."""

    folder: Path
    base: Path
    data: Path
    said: str


@pytest.fixture(scope="session")
def smoke_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of drawn scenes: refcoco, grefcoco, MUSE and LLaVA files, train and val."""
    root = tmp_path_factory.mktemp("smoke") / "data"
    with contextlib.redirect_stderr(io.StringIO()):
        write_scene_data(root, SceneDataSettings(train=24, heldout=10, questions=20, scene=SceneSettings(side=48)))
    return root


@pytest.fixture(scope="session")
def smoke_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixelLM folder with random weights."""
    folder = tmp_path_factory.mktemp("smoke") / "base"
    built = make_model()
    with contextlib.redirect_stderr(io.StringIO()):
        save_model(built.model, built.processor, folder)
    return folder


def training_flags(base: Path, data: Path, out: Path, name: str) -> list[str]:
    """Flags of a run of STEPS steps of four images, where ranks x rounds are two."""
    flags = f"--version={base} --dataset_dir={data} --log_base_dir={out} --exp_name={name}"
    flags += " --dataset=refer_seg||multi_reason_seg"
    flags += (
        f" --sample_rates=1,1 --refer_seg_data=refcoco||grefcoco --batch_size=2 --max_steps={STEPS} --steps_per_epoch=2"
    )
    flags += " --precision=fp32 --lora_dropout=0 --lr=1e-3 --warmup_steps=2 --workers=0 --max_new_tokens=8"
    flags += " --val_dataset=MultiReasonSeg|val --val_limit=4 --val_batch_size=4"
    return flags.split()


@pytest.fixture(scope="session")
def deepspeed_run(smoke_base: Path, smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """Two ranks under DeepSpeed's launcher, ZeRO-2."""
    out = tmp_path_factory.mktemp("runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    flags = training_flags(smoke_base, smoke_data, out, "two-ranks")
    command = [
        launcher,
        "--num_gpus",
        "2",
        "--master_port",
        str(port),
        "train_ds.py",
        *flags,
        "--grad_accumulation_steps=1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return SmokeRun(out / "two-ranks", smoke_base, smoke_data, done.stdout + done.stderr)


class Trainer:
    """A process that trains as told, and keeps what it has imported."""

    def __init__(self, base: Path, data: Path, out: Path) -> None:
        self.base, self.data, self.out, self.numbers = base, data, out, count()
        command = [sys.executable, "-m", "tests.smoke.killing"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        name: str,
        *flags: str,
        ranks: int = 1,
        kill: tuple[int, int] | None = None,
        fails: bool = False,
        counted: bool = False,
    ) -> Outcome:
        """One start of the run called `name`; what its ranks said is in `said`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        every = [*training_flags(self.base, self.data, self.out, "unnamed"), f"--exp_name={name}"]
        every += [f"--grad_accumulation_steps={2 // ranks}", "--no_eval", *flags]
        log = str(self.out / f"{name}.{next(self.numbers)}")
        self.process.stdin.write(json.dumps(asdict(Job(every, log, ranks, kill, fails, counted))) + "\n")
        self.process.stdin.flush()
        outcome = Outcome(**json.loads(self.process.stdout.readline()))
        self.said = [Path(f"{log}.rank{rank}").read_text() for rank in range(1 if fails else ranks)]
        return outcome

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")  # its end is not seen while workers of loaders hold it open
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def trainer(smoke_base: Path, smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    trainer = Trainer(smoke_base, smoke_data, tmp_path_factory.mktemp("trained"))
    yield trainer
    trainer.close()

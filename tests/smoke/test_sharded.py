"""ZeRO-3 holds its parts only, while a model is built, and leaves what the unsharded run leaves."""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge_lora_weights_and_save_hf_model as merge
from demo.stages import free_port
from demo.tiny import make_tiny
from tests.smoke.conftest import ROOT, STEPS, Trainer
from tests.unit.tiny_pixellm import SHAPE, TEXTS
from utils.checkpoints.builder import save_model
from utils.engine.checkpoints import require_tag
from utils.engine.sample_log import read_losses

BYTES = 4
# Three matrices of 2048 x 8192 in each of five layers: 252 million numbers, a gigabyte.
LARGE = dataclasses.replace(SHAPE, width=2048, mlp_width=8192, layers=5)


@pytest.fixture(scope="module")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "base"
    built = make_tiny(TEXTS, LARGE, seed=0)
    with contextlib.redirect_stderr(io.StringIO()):
        save_model(built.model, built.processor, folder)
    return folder


def most_memory(base: Path, out: Path, stage: int, env: dict[str, str]) -> list[tuple[int, int]]:
    """(most bytes while building, numbers of the model) of each of two ranks."""
    flags = [f"--version={base}", "--engine=deepspeed", f"--zero_stage={stage}", "--precision=fp32", "--no_eval"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    script = str(ROOT / "tests" / "unit" / "sharded_memory.py")
    done = subprocess.run(
        [*command, script, str(out), *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    read = [Path(f"{out}.rank{rank}").read_text().split() for rank in range(2)]
    return [(int(most), int(numbers)) for most, numbers in read]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_model_is_never_whole_in_a_process(large_base: Path, tmp_path: Path, child_env: dict[str, str]) -> None:
    whole = most_memory(large_base, tmp_path / "whole", 2, child_env)
    parts = most_memory(large_base, tmp_path / "parts", 3, child_env)
    for (unsharded, numbers), (sharded, same) in zip(whole, parts, strict=True):
        print(f"{sharded / 2**20:.0f} of {unsharded / 2**20:.0f} MiB")
        assert same == numbers > 250e6 and unsharded > 0.95 * BYTES * numbers
        assert sharded <= 0.7 * unsharded


@pytest.mark.long
@pytest.mark.timeout(900)
def test_stage_3_validates_though_no_rank_has_all_weights(trainer: Trainer) -> None:
    """Ranks whose answers differ in length do not wait for each other, and training goes on as without validation."""
    flags = ("--engine=deepspeed", "--zero_stage=3", "--validate_every=1")
    for name, more in (("scored", ("--no-no_eval",)), ("unscored", ())):
        outcome = trainer.run(name, *flags, *more, ranks=2)
        assert outcome.statuses == [0, 0], trainer.said
    assert trainer.said[0].count("giou") == 0
    assert read_losses(trainer.out / "scored") == read_losses(trainer.out / "unscored")
    assert json.loads((trainer.out / "scored" / "validation.json").read_text())["validated"] == STEPS


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_stage_3_leaves_is_what_stage_0_leaves(trainer: Trainer, tmp_path: Path) -> None:
    """Trained apart, with dropout, clipping and several rounds to a step, the exported models agree to rounding; and
    so does one that changed its stage after two of the three steps."""
    flags = "--grad_accumulation_steps=2 --batch_size=1 --grad_clip=0.5 --max_steps=3 --print_freq=1"
    flags += " --lora_dropout=0.1"
    first, second, changed = "apart under stage 0", "apart under stage 3", "from stage 0 to 3"
    half_way = trainer.out / first / "ckpt_model" / "step2"
    models = {}
    for name, stage, more in ((first, 0, []), (second, 3, []), (changed, 3, [f"--resume={half_way}"])):
        exported(trainer, name, stage, *flags.split(), *more)
        norms = re.findall(r"grad ([\d.]+)", trainer.said[0])
        assert norms and min(map(float, norms)) > 0.5, "not every step was clipped"
        weight = trainer.out / name / ("pytorch_model.bin" if stage else "ckpt_model")
        assert merge.main([f"--weight={weight}", f"--save_path={tmp_path / name}"]) == 0
        models[name] = load_file(tmp_path / name / "model.safetensors")
    for name in (second, changed):
        assert models[first].keys() == models[name].keys()
        assert mean_apart(models[first], models[name]) < 1e-5, name


@pytest.mark.long
@pytest.mark.timeout(900)
def test_stages_leave_the_same_of_a_training_that_changed_stage(trainer: Trainer) -> None:
    """A training is exported to the same bits from either stage, whichever it was made under; the other takes it on for
    a step that moves nothing. Trained apart the last bits differ: stage 3 adds up gradients in another order.
    """
    made = {stage: trained_under(trainer, stage) for stage in (0, 3)}
    for stage, other in ((0, 3), (3, 0)):
        start = trainer.out / f"stage {stage}" / "ckpt_model" / "step3"
        name, flags = f"stage {stage} taken on", ("--lr=0", "--max_steps=4", f"--resume={start}")
        again = exported(trainer, name, other, "--grad_clip=0", *flags)
        assert again.keys() == made[stage].keys()
        assert [name for name, value in again.items() if not torch.equal(value, made[stage][name])] == []
    assert mean_apart(made[0], made[3]) < 1e-5


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_stage_1_leaves_is_whole(trainer: Trainer) -> None:
    """Weights that do not train included, and those to the bit. What trains agrees to rounding: AdamW's fused step
    rounds a tensor's last few numbers in another way than the rest, and stages cut tensors up differently."""
    flags = ("--grad_clip=0", "--max_steps=3")
    wanted, found = (exported(trainer, f"whole under stage {stage}", stage, *flags) for stage in (0, 1))
    assert found.keys() == wanted.keys()
    differing = {name for name, value in wanted.items() if not torch.equal(value, found[name])}
    assert differing <= trained_names(trainer.out / "whole under stage 0")
    assert mean_apart(wanted, found) < 1e-5


def trained_names(run: Path) -> set[str]:
    """Names of the parameters that trained, as the run card has them."""
    return set(json.loads((run / "run.json").read_text())["trained"])


def mean_apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The mean over all numbers of how far two sets of weights are apart."""
    parts = [(value.detach() - other[name].detach()).flatten().double() for name, value in one.items()]
    return float(torch.cat(parts).abs().mean())


def trained_under(trainer: Trainer, stage: int) -> dict[str, torch.Tensor]:
    """What three steps leave, without clipping, whose norm is summed in another order under every stage."""
    return exported(trainer, f"stage {stage}", stage, "--grad_clip=0", "--max_steps=3")


def exported(trainer: Trainer, name: str, stage: int, *flags: str) -> dict[str, torch.Tensor]:
    """What a run leaves, as merging reads it; the run is made once."""
    folder = trainer.out / name / "ckpt_model"
    if not folder.exists():
        more = ("--engine=deepspeed", f"--zero_stage={stage}")
        outcome = trainer.run(name, *flags, *more, ranks=2)
        assert outcome.statuses == [0, 0], trainer.said
    if stage:
        return gathered(folder)
    return torch.load(folder / require_tag(folder) / "pytorch_model.bin", weights_only=True)


def gathered(folder: Path) -> dict[str, torch.Tensor]:
    """What zero_to_fp32.py puts together."""
    out = folder.parent / "pytorch_model.bin"
    command = [sys.executable, "zero_to_fp32.py", ".", str(out)]
    subprocess.run(command, cwd=folder, env=os.environ.copy(), capture_output=True, timeout=300, check=True)
    return torch.load(out / "pytorch_model.bin", weights_only=True)

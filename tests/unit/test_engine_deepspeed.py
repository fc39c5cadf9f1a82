"""Two ranks in one launch, under DeepSpeed and without: one process's step, resume, lonely targets; configuration."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.engine_real import real_step, words_and_targets, write_real
from tests.unit.engine_toys import cut, make_samples, make_toy
from utils.cli.errors import UserError
from utils.engine.checkpoints import latest_tag
from utils.engine.deepspeed_engine import deepspeed_config, read_user_config
from utils.engine.plain_engine import PlainEngine
from utils.engine.runtime import Runtime, deepspeed_problem
from utils.engine.stepping import OptimizerSettings

ROOT = Path(__file__).resolve().parents[2]
CASES = ("zero0-rounds2", "zero1-rounds2", "zero2-rounds1", "zero2-rounds4", "zero3-rounds2")
RATE = 1e-2


def on_two_ranks(job: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Run a job of engine_ranks.py under torchrun."""
    problem = deepspeed_problem(torch.device("cpu"))
    assert problem is None, problem
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    script = str(Path(__file__).with_name("engine_ranks.py"))
    return subprocess.run(
        [*command, script, job, str(out)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """What engine_ranks.py found on two ranks: its folder and its lines."""
    out = tmp_path_factory.mktemp("ranks")
    write_real(out)
    done = on_two_ranks("all", out)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, json.loads((out / "lines.json").read_text())


@pytest.mark.parametrize("case", [*CASES, "plain-rounds1", "plain-rounds4"])
def test_two_ranks_make_the_step_of_one_process(case: str, ranks: tuple[Path, dict]) -> None:
    out, lines = ranks
    toy = make_toy(warm=True)
    engine = PlainEngine(toy, OptimizerSettings(gradient_clip=0.0), "fp32", torch.device("cpu"))
    batches = cut(make_samples(8), 1, 1, 0)
    engine.accumulate(batches)
    gradient = {n: p.grad.clone() for n, p in sorted(toy.named_parameters()) if p.grad is not None}
    engine.optimizer.zero_grad()
    report = engine.train_step(batches, RATE)
    state = torch.load(out / f"{case}.pt", weights_only=True)
    ours = torch.cat([g.flatten() for g in gradient.values()])
    theirs = torch.cat([state[f"gradient/{name}"].flatten() for name in gradient])
    assert (theirs - ours).norm() <= 1e-5 * ours.norm()
    for name in gradient:
        # A first AdamW step moves by about the rate whatever the gradient, so rounding near zero shows.
        assert torch.allclose(state[f"weight/{name}"], dict(toy.named_parameters())[name], atol=1e-3 * RATE)
    if case.startswith("plain"):
        return
    assert lines[case]["losses"] == pytest.approx(report.losses, rel=1e-6)
    assert lines[case]["counts"] == report.counts
    assert lines[case]["norm"] == pytest.approx(report.gradient_norm, rel=1e-5)


def test_two_ranks_make_the_gradient_of_one_process_on_a_true_model(ranks: tuple[Path, dict]) -> None:
    out, _ = ranks
    cpu = torch.device("cpu")
    model, step = real_step(out, Runtime("plain", 0, 0, 1, cpu), rounds=1)
    PlainEngine(model, OptimizerSettings(gradient_clip=0.0), "fp32", cpu).accumulate(step)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in ours.values()]).norm()
    cases = sorted(out.glob("real-rounds*.pt"))
    assert len(cases) == 2
    for case in cases:
        state = torch.load(case, weights_only=True)
        assert {name for name in state if name.startswith("gradient/")} == {f"gradient/{name}" for name in ours}
        apart = torch.cat([(state[f"gradient/{name}"] - g).flatten() for name, g in ours.items()])
        assert apart.norm() <= 1e-5 * norm, case


def test_a_rank_without_targets_neither_hangs_nor_breaks(ranks: tuple[Path, dict]) -> None:
    lonely = ranks[1]["lonely"]
    assert lonely["counts"] == {"ce": 1.0, "mask": 2.0}
    assert lonely["nothing"] == {"ce": 0.0, "mask": 0.0} and lonely["norm"] == 0.0


def test_ranks_that_differ_in_what_they_have_to_do_finish_under_stage_3(ranks: tuple[Path, dict]) -> None:
    """Words alone against targets, and answers of two and of six tokens; the losses are those of one process."""
    out, lines = ranks
    model, *batches = words_and_targets(out)
    engine = PlainEngine(model, OptimizerSettings(gradient_clip=0.0), "fp32", torch.device("cpu"))
    totals = [engine.train_step(batches, RATE).total for _ in range(2)]
    assert lines["lonely answers"] == {"totals": pytest.approx(totals, rel=1e-3), "lengths": [2, 6]}
    assert lines["lonely answers"]["totals"][0] == pytest.approx(totals[0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(stage: int, ranks: tuple[Path, dict]) -> None:
    wanted = {"applied": [False, True], "same": True, "finite": True}
    assert ranks[1][f"spoiled{stage}"] == [wanted, wanted]


def test_a_checkpoint_goes_on_where_it_was(ranks: tuple[Path, dict]) -> None:
    out, lines = ranks
    assert lines["resume"] == {
        "client": 1,
        "wanted": lines["resume"]["wanted"],
        "found": lines["resume"]["wanted"],
        "same": True,
    }
    assert (out / "checkpoint" / "zero_to_fp32.py").is_file() and (out / "checkpoint" / "latest").read_text() == "step1"
    assert lines["gathered"] == [0, 1]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_checkpoints_of_earlier_versions_are_taken_on(stage: int, ranks: tuple[Path, dict]) -> None:
    """Losses of the third step, as the version that wrote the checkpoints made it."""
    third = {"ce": 2.1548803647359214, "mask": 0.5111602544784546}
    assert ranks[1][f"old{stage}"] == {"client": {"step": 2}, "losses": pytest.approx(third, rel=1e-5)}


@pytest.mark.long
def test_a_rank_without_space_ends_the_run_and_the_last_checkpoint_counts(tmp_path: Path) -> None:
    done = on_two_ranks("full_disk", tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("engine_ranks.py: ")]
    assert any("cannot write the checkpoint" in line and "No space left on device" in line for line in said), said
    assert latest_tag(tmp_path) == "step1"
    assert "ended, so this one ends too" in done.stderr or len(said) == 1


def test_bf16_holds_float32_where_the_plain_engine_does(ranks: tuple[Path, dict]) -> None:
    found = ranks[1]["bf16"]
    engine = PlainEngine(make_toy(warm=True), OptimizerSettings(), "bf16", torch.device("cpu"))
    types = {name: str(p.dtype) for name, p in engine.model.named_parameters()} | {"buffer": "torch.float32"}
    assert found["dtypes"] == types
    plain = engine.train_step(cut(make_samples(4, 1), 1, 1, 0), RATE).total
    assert found["total"] == pytest.approx(plain, rel=2e-2)


def test_the_configuration() -> None:
    numbers = {"micro_batch": 2, "gradient_accumulation_steps": 5, "world_size": 8, "clip": 1.0, "numel": 1000}
    config = deepspeed_config({}, zero_stage=2, precision="bf16", **numbers)
    assert config["train_batch_size"] == 80 and config["torch_autocast"]["dtype"] == "bfloat16"
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    user = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    config = deepspeed_config(user, zero_stage=3, precision="fp16", **numbers)
    assert config["zero_optimization"] == user["zero_optimization"] and config["fp16"] == {"enabled": True}
    assert "torch_autocast" not in deepspeed_config({}, zero_stage=1, precision="fp32", **numbers)


@pytest.mark.parametrize(
    ("content", "stage", "part"),
    [
        ("{", None, "not valid JSON"),
        ("[]", None, "must hold a JSON object"),
        ('{"optimizer": {"type": "SGD"}, "bf16": {}}', None, "sets optimizer, bf16, which flags decide"),
        ('{"zero_optimization": {"stage": 3}}', 2, "--zero_stage is 2, but .* says 3"),
        (None, None, "cannot read --deepspeed_config"),
    ],
)
def test_a_bad_configuration_file(content: str | None, stage: int | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=part):
        read_user_config(str(path), stage)


def test_the_files_in_configs_are_taken(tmp_path: Path) -> None:
    for stage in (2, 3):
        config = read_user_config(str(ROOT / "configs" / f"zero{stage}.json"), stage)
        assert config["zero_optimization"]["stage"] == stage
    assert read_user_config("", 2) == {}
    path = tmp_path / "zero.json"
    path.write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 1}}')
    assert read_user_config(str(path), None) == {"zero_optimization": {"stage": 1}}

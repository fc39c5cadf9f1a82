"""Run under a launcher by test_engine_deepspeed.py: what DeepSpeed makes of one step, for many cuts of it."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from tests.unit.engine_real import answer_length, real_step, words_and_targets
from tests.unit.engine_toys import collate, cut, make_samples, make_toy
from utils.cli.errors import run_script
from utils.engine.deepspeed_engine import DeepSpeedEngine
from utils.engine.plain_engine import PlainEngine
from utils.engine.runtime import open_runtime
from utils.engine.saving import load_checkpoint, save_checkpoint
from utils.engine.stepping import OptimizerSettings

BETA1, RATE = 0.9, 1e-2
REAL_ROUNDS = (1, 4)
OLD = Path(__file__).resolve().parents[1] / "fixtures" / "old_checkpoints"


def make_engine(stage: int, rounds: int, precision: str = "fp32", clip: float = 0.0) -> DeepSpeedEngine:
    settings = OptimizerSettings(betas=(BETA1, 0.95), gradient_clip=clip)
    toy = make_toy(warm=True)
    return DeepSpeedEngine(
        toy,
        settings,
        precision,
        torch.device("cpu"),
        micro_batch=1,
        gradient_accumulation_steps=rounds,
        zero_stage=stage,
    )


def state_of(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Gradient of the one step that was made (AdamW's first moment is (1 - beta1) of it), and the weights after it."""
    found = {}
    for name, parameter in sorted(engine.model.named_parameters()):
        if parameter.requires_grad:
            if engine.zero_stage == 0:
                moment, weight = engine.deepspeed.optimizer.state[parameter]["exp_avg"], parameter.detach()
            else:
                moment = safe_get_full_optimizer_state(parameter, "exp_avg")
                weight = safe_get_full_fp32_param(parameter)
            found[f"gradient/{name}"] = (moment / (1 - BETA1)).clone()
            found[f"weight/{name}"] = weight.clone()
    return found


def main(out: Path) -> None:
    samples = make_samples(8)
    lines = {}
    for stage, rounds, precision in ((0, 2, "fp32"), (1, 2, "fp32"), (2, 1, "fp32"), (2, 4, "fp32"), (3, 2, "fp32")):
        engine = make_engine(stage, rounds, precision)
        report = engine.train_step(cut(samples, engine.world_size, rounds, engine.rank), 1e-2)
        case = f"zero{stage}-rounds{rounds}"
        state = state_of(engine)
        lines[case] = {"losses": report.losses, "counts": report.counts, "norm": report.gradient_norm}
        if engine.rank == 0:
            torch.save(state, out / f"{case}.pt")
    real_model(out)
    plain(out)
    lonely(lines)
    lonely_answers(out, lines)
    spoiled(lines)
    checkpoint(out, lines)
    old_checkpoints(lines)
    if engine.rank == 0:
        (out / "lines.json").write_text(json.dumps(lines))
    engine.close()


def real_model(out: Path) -> None:
    """One step of a true PixelLM for some cuts; the test wrote what it needs into `out`."""
    runtime = open_runtime("deepspeed", 0, "fp32")
    for rounds in REAL_ROUNDS:
        model, step = real_step(out, runtime, rounds)
        settings = OptimizerSettings(betas=(BETA1, 0.95), gradient_clip=0.0)
        size = len(step[0].resized_sizes)
        engine = DeepSpeedEngine(
            model, settings, "fp32", runtime.device, micro_batch=size, gradient_accumulation_steps=rounds, zero_stage=2
        )
        engine.train_step(step, 1e-2)
        state = state_of(engine)
        if engine.rank == 0:
            torch.save(state, out / f"real-rounds{rounds}.pt")


def plain(out: Path) -> None:
    """The plain engine on two ranks: a step for some cuts, from weights that differed until the first rank's were sent;
    then a checkpoint, which the first rank writes and both read."""
    settings = OptimizerSettings(betas=(BETA1, 0.95), gradient_clip=0.0)
    for rounds in (1, 4):
        rank = torch.distributed.get_rank()
        engine = PlainEngine(make_toy(seed=rank, warm=True), settings, "fp32", torch.device("cpu"))
        engine.train_step(cut(make_samples(8), engine.world_size, rounds, engine.rank), 1e-2)
        found = {}
        for name, parameter in sorted(engine.model.named_parameters()):
            if parameter.requires_grad:
                found[f"gradient/{name}"] = engine.optimizer.state[parameter]["exp_avg"] / (1 - BETA1)
                found[f"weight/{name}"] = parameter.detach().clone()
        weights = [
            part
            for part in engine.gather(found)
            if not torch.equal(part["weight/head.weight"], found["weight/head.weight"])
        ]
        assert not weights, "ranks went apart"
        if engine.rank == 0:
            torch.save(found, out / f"plain-rounds{rounds}.pt")
    place = save_checkpoint(engine, out / "plain", 1, {"step": 1})
    assert load_checkpoint(engine, place) == {"step": 1}


def lonely(lines: dict) -> None:
    """Only rank 0 has targets; then nobody has any."""
    engine = make_engine(2, 1)
    full = (torch.ones(6), 1, torch.ones(2))
    empty = (torch.ones(6), -100, torch.ones(0))
    report = engine.train_step([collate([full if engine.rank == 0 else empty])], 1e-2)
    nothing = engine.train_step([collate([empty])], 1e-2)
    lines["lonely"] = {"counts": report.counts, "nothing": nothing.losses, "norm": nothing.gradient_norm}


def lonely_answers(out: Path, lines: dict) -> None:
    """Under stage 3 a true model, whose layers are gathered by all ranks together: words alone on rank 0 and targets on
    rank 1, then answers of different lengths, then such a step again."""
    model, *batches = words_and_targets(out)
    settings = OptimizerSettings(betas=(BETA1, 0.95), gradient_clip=0.0)
    engine = DeepSpeedEngine(
        model, settings, "fp32", torch.device("cpu"), micro_batch=1, gradient_accumulation_steps=1, zero_stage=3
    )
    own = batches[engine.rank]
    totals = [engine.train_step([own], RATE).total]
    with engine.inference():
        length = answer_length(engine.model, own, 2 + 4 * engine.rank)
    totals.append(engine.train_step([own], RATE).total)
    lines["lonely answers"] = {"totals": totals, "lengths": engine.gather(length)}


def spoiled(lines: dict) -> None:
    """One rank's batch is not finite: the step is left out on both, whatever the stage, and the next one is taken."""
    for stage in (0, 1, 2, 3):
        engine = make_engine(stage, 1, clip=1.0)
        features, label, targets = make_samples(1)[0]
        broken = torch.full_like(features, math.nan) if engine.rank == 1 else features
        weights = list(dict(sorted(engine.model.named_parameters())).values())
        before = [safe_get_full_fp32_param(weight) if stage else weight.detach().clone() for weight in trained(weights)]
        left_out = engine.train_step([collate([(broken, label, targets)])], RATE)
        after = [safe_get_full_fp32_param(weight) if stage else weight.detach().clone() for weight in trained(weights)]
        taken = engine.train_step([collate([(features, label, targets)])], RATE)
        same = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        found = {"applied": [left_out.applied, taken.applied], "same": same, "finite": math.isfinite(taken.total)}
        lines[f"spoiled{stage}"] = engine.gather(found)


def trained(weights: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [weight for weight in weights if weight.requires_grad]


def checkpoint(out: Path, lines: dict) -> None:
    """Two steps straight, against one step, save, load into a new engine, one step."""
    steps = [make_samples(4, seed) for seed in (1, 2)]
    straight = make_engine(2, 1, clip=1.0)
    wanted = [straight.train_step(cut(s, straight.world_size, 1, straight.rank), 1e-2).total for s in steps]
    first = make_engine(2, 1, clip=1.0)
    first.train_step(cut(steps[0], first.world_size, 1, first.rank), 1e-2)
    place = save_checkpoint(first, out / "checkpoint", 1, {"step": 1})
    second = make_engine(2, 1, clip=1.0)
    client = load_checkpoint(second, place)
    resumed = second.train_step(cut(steps[1], second.world_size, 1, second.rank), 1e-2).total
    same = all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True))
    lines["resume"] = {"client": client["step"], "wanted": wanted[1], "found": resumed, "same": same}
    low = make_engine(2, 1, precision="bf16")
    report = low.train_step(cut(steps[0], low.world_size, 1, low.rank), 1e-2)
    dtypes = {n: str(p.dtype) for n, p in low.model.named_parameters()} | {"buffer": str(low.model.frequencies.dtype)}
    lines["bf16"] = {"total": report.total, "dtypes": dtypes}
    lines["gathered"] = low.gather(low.rank)


def old_checkpoints(lines: dict) -> None:
    """What one rank wrote under three stages before engines had their present form, taken on under stage 2 by two."""
    for stage in (0, 2, 3):
        engine = make_engine(2, 1)
        client = load_checkpoint(engine, OLD / f"zero{stage}" / "step2")
        report = engine.train_step(cut(make_samples(4, 9), engine.world_size, 1, engine.rank), RATE)
        lines[f"old{stage}"] = {"client": client, "losses": report.losses}


def full_disk(out: Path) -> None:
    """A first checkpoint, then one for which rank 1 finds no space."""
    engine = make_engine(2, 1)
    save_checkpoint(engine, out, 1, {"step": 1})

    def full(value: object, place: str | Path, **_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))

    if engine.rank == 1:
        torch.save = full
    save_checkpoint(engine, out, 2, {"step": 2})


if __name__ == "__main__":
    job = full_disk if sys.argv[1] == "full_disk" else main
    status = run_script(lambda _: job(Path(sys.argv[2])), [])
    sys.stdout.flush()
    sys.stderr.flush()
    # Ten engines in one process leave threads that sometimes abort the interpreter's own way out.
    os._exit(status)

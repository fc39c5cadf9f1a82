"""One optimizer step: normalisation whatever the cut, AdamW by hand, the schedule, precision, the probe."""

import math

import pytest
import torch
from torch import nn

from tests.unit.engine_toys import WIDTH, ToyBatch, collate, cut, gradients, make_samples, make_toy
from utils.cli.errors import UserError
from utils.engine.plain_engine import PlainEngine
from utils.engine.probe import GradientError, find_probe_batch, probe_gradients
from utils.engine.stepping import OptimizerSettings, Schedule, make_optimizer, set_learning_rate, to_precision

CPU = torch.device("cpu")
RATE = 1e-2


def plain(settings: OptimizerSettings | None = None, precision: str = "fp32", warm: bool = True) -> PlainEngine:
    return PlainEngine(make_toy(warm=warm), settings or OptimizerSettings(gradient_clip=0.0), precision, CPU)


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("count", [8, 16])
def test_the_gradient_does_not_depend_on_the_cut(count: int) -> None:
    samples = make_samples(count)
    assert {len(targets) for *_, targets in samples} == {0, 1, 2, 3}
    reference = None
    for rounds in (1, 2, 4, 8):
        engine = plain()
        losses, counts = engine.accumulate(cut(samples, 1, rounds, 0))
        found = gradients(engine.model)
        reference = found if reference is None else reference
        assert (found - reference).norm() <= 1e-5 * reference.norm()
        assert counts == {"ce": sum(s[1] != -100 for s in samples), "mask": sum(len(s[2]) for s in samples)}
    toy = make_toy(warm=True)
    whole = toy(**collate(samples).as_kwargs()).losses
    by_hand = torch.stack([toy.loss_weights[name] * term.sum / term.count for name, term in whole.items()]).sum()
    by_hand.backward()
    assert (gradients(toy) - reference).norm() <= 1e-5 * reference.norm()
    assert sum(toy.loss_weights[n] * v for n, v in losses.items()) == pytest.approx(by_hand.item(), rel=1e-6)


def test_micro_batches_may_weigh_the_same_instead() -> None:
    """As in the release: each divides by its own counts, and the step is their mean."""
    batches = cut(make_samples(8), 1, 4, 0)
    engine = plain(OptimizerSettings(gradient_clip=0.0, loss_normalisation="micro_batch"))
    losses, counts = engine.accumulate(batches)
    toy = make_toy(warm=True)
    for batch in batches:
        terms = toy(**batch.as_kwargs()).losses
        own = [toy.loss_weights[name] * term.sum / max(float(term.count), 1.0) for name, term in terms.items()]
        (torch.stack(own).sum() / len(batches)).backward()
    assert (gradients(toy) - gradients(engine.model)).norm() <= 1e-5 * gradients(toy).norm()
    by_step = plain()
    assert by_step.accumulate(batches) == (losses, counts), "what is reported stays the mean over the step"
    assert (gradients(by_step.model) - gradients(engine.model)).norm() > 1e-3 * gradients(toy).norm()


def test_a_step_with_nothing_to_learn_leaves_zeros_not_holes() -> None:
    engine = plain()
    nothing = [(torch.ones(WIDTH), -100, torch.ones(0))] * 2
    losses, counts = engine.accumulate([collate(nothing)])
    assert losses == {"ce": 0.0, "mask": 0.0} and counts == {"ce": 0.0, "mask": 0.0}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_one_update_is_adamw_by_hand() -> None:
    """w <- w (1 - lr decay) - lr m / (sqrt(v) + eps) with m, v bias-corrected; the gradient clipped to norm 1 first."""
    decay, beta1, beta2 = 0.1, 0.9, 0.95
    engine = plain(OptimizerSettings((beta1, beta2), decay, gradient_clip=0.5))
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    batches = cut(make_samples(8), 1, 1, 0)
    twin = plain()
    twin.accumulate(batches)
    raw = {name: p.grad.clone() for name, p in twin.model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in raw.values()))
    report = engine.train_step(batches, RATE)
    assert norm > 0.5 and report.gradient_norm == pytest.approx(norm, rel=1e-5) and report.learning_rate == RATE
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name])
            continue
        gradient = raw[name].double() * (0.5 / (norm + 1e-6))
        mean, square = (1 - beta1) * gradient / (1 - beta1), (1 - beta2) * gradient**2 / (1 - beta2)
        shrunk = before[name].double() * (1 - RATE * decay * (before[name].ndim >= 2))
        by_hand = shrunk - RATE * mean / (square.sqrt() + 1e-8)
        assert torch.allclose(parameter.double(), by_hand, atol=1e-7), name
        assert parameter.grad is None


def test_groups_cover_what_trains_and_carry_their_multiplier() -> None:
    toy = make_toy()
    optimizer = make_optimizer(toy, OptimizerSettings(weight_decay=0.1, multipliers={"mask_part.": 3.0}))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in toy.parameters() if p.requires_grad}
    assert len(grouped) == len(trained(toy))
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(toy.mask_part.weight)] == (pytest.approx(0.3), 0.1)
    assert rates[id(toy.head.bias)] == (0.1, 0.0)
    with pytest.raises(UserError, match="nothing is left to train"):
        make_optimizer(toy.requires_grad_(False), OptimizerSettings())


def test_the_schedule() -> None:
    linear = Schedule(peak=1.0, total_steps=10, warmup_steps=4)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6, 0.0]
    assert [linear.rate(step) for step in range(11)] == pytest.approx(expected)
    cosine = Schedule(1.0, 10, 2, "cosine")
    assert [cosine.rate(step) for step in (1, 2, 6, 10)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert Schedule(1.0, 10, 0, "constant").rate(9) == 1.0
    assert Schedule(1.0, 2, 100).rate(1) == 0.02


def test_bf16_keeps_float32_for_what_trains_and_for_buffers() -> None:
    engine = plain(precision="bf16")
    types = {name: p.dtype for name, p in engine.model.named_parameters()}
    assert types.pop("trunk.base.weight") == torch.bfloat16
    assert set(types.values()) == {torch.float32} and engine.model.frequencies.dtype == torch.float32
    batches = cut(make_samples(8), 1, 2, 0)
    low, full = engine.train_step(batches, RATE), plain().train_step(batches, RATE)
    assert low.total == pytest.approx(full.total, rel=2e-2) and low.total != full.total
    again = make_toy().requires_grad_(False)
    to_precision(again, "fp32")
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_inference_mode_ends_even_after_an_error() -> None:
    engine = plain(precision="bf16")
    engine.model.train()
    with pytest.raises(RuntimeError, match="inside"), engine.inference():
        assert not engine.model.training and not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        raise RuntimeError("inside")
    assert engine.model.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


# --- the probe -------------------------------------------------------------------------------------------------


def probe(model: nn.Module, expected: list[str] | None = None, batch: ToyBatch | None = None) -> None:
    samples = make_samples(8)
    probe_gradients(model, batch or collate(samples), trained(model) if expected is None else expected, "fp32", CPU)


def test_the_probe_passes_lora_at_its_start_and_leaves_no_trace() -> None:
    toy = make_toy()
    toy.eval()
    before, state = [p.clone() for p in toy.parameters()], torch.get_rng_state()
    probe(toy)
    assert all(torch.equal(a, b) for a, b in zip(before, toy.parameters(), strict=True))
    assert all(p.grad is None for p in toy.parameters()) and not toy.training
    assert torch.equal(state, torch.get_rng_state())


def test_the_probe_names_what_is_wrong() -> None:
    cut_off = make_toy()
    cut_off.extra = nn.Parameter(torch.ones(3))
    with pytest.raises(GradientError, match="'extra' should train but no gradient reaches it"):
        probe(cut_off)
    thawed = make_toy()
    frozen = [name for name in trained(thawed) if not name.startswith("head")]
    with pytest.raises(GradientError, match=r"'head\.weight' should be frozen but is set to train \(and 1 more"):
        probe(thawed, frozen)
    with pytest.raises(GradientError, match=r"'trunk\.base\.weight' should train but is frozen"):
        probe(make_toy(), [*trained(make_toy()), "trunk.base.weight"])
    with pytest.raises(GradientError, match="'nowhere' should train but is no parameter"):
        probe(make_toy(), [*trained(make_toy()), "nowhere"])
    with pytest.raises(GradientError, match=r"'mask_part\.bias' should train but its gradient is exactly zero"):
        probe(make_toy(), batch=collate([s for s in make_samples(16) if not len(s[2])]))
    dead = make_toy()
    nn.init.zeros_(dead.trunk.lora_A["default"].weight)
    with pytest.raises(GradientError, match=r"lora_B\.default\.weight' should train but its gradient is exactly zero"):
        probe(dead)
    sick = make_toy()
    nn.init.constant_(sick.head.bias, float("nan"))
    with pytest.raises(GradientError, match="not finite"):
        probe(sick)


def test_the_probe_refuses_counts_that_disagree() -> None:
    toy = make_toy()
    toy.count_losses = lambda **_: {"ce": 1.0, "mask": 1.0}  # type: ignore[method-assign]
    with pytest.raises(GradientError, match="counts its losses"):
        probe(toy)


def test_the_probe_batch_has_something_for_every_loss() -> None:
    toy = make_toy()
    batches = [collate([sample]) for sample in make_samples(8)]
    found = find_probe_batch(toy, batches, ["ce", "mask"])
    assert toy.count_losses(**found.as_kwargs())["mask"] > 0
    with pytest.raises(GradientError, match="something to learn for the loss of mask"):
        find_probe_batch(toy, [b for b in batches if not len(b.targets[0])], ["ce", "mask"])

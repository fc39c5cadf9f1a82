"""One order of sums under every stage, without DeepSpeed's ranks: nodes, norms, clipping and rounds."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from utils.engine.same_sums import SummedRounds, clip, norm_of, sum_as_stage_3


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


class Uses(nn.Module):
    """Uses its inputs, and hands out every container that a module may."""

    def forward(self, pair: Pair, listed: list[torch.Tensor], named: dict[str, torch.Tensor]) -> dict[str, object]:
        self.seen = [pair.first, listed[0], named["x"]]
        return {"pair": Pair(pair.first * 1, pair.second), "sum": (listed[0] + named["x"], None)}


@pytest.fixture
def linear_back() -> object:
    """sum_as_stage_3 takes another linear layer for the whole process."""
    kept = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = kept


def test_strides_stay_as_they_are(linear_back: None) -> None:
    """An axis of one may have any stride, and torch chooses how it computes by it."""
    module = nn.Identity()
    sum_as_stage_3(module)
    given = torch.zeros(2, 4, 5, 3, requires_grad=True).permute(0, 3, 1, 2)[:1]
    assert module(given).stride() == given.stride() != given.view_as(given).stride()


def test_every_tensor_goes_through_a_node(linear_back: None) -> None:
    module = Uses()
    sum_as_stage_3(module)
    tensors = [torch.ones(2, requires_grad=True) * factor for factor in (1, 2, 3)]
    given = {"x": tensors[2]}
    out = module(Pair(tensors[0], 7), [tensors[1]], given)
    for seen, tensor in zip(module.seen, tensors, strict=True):
        assert seen is not tensor and seen.grad_fn.next_functions[0][0] is tensor.grad_fn
    assert given["x"] is module.seen[2]
    assert out["pair"].second == 7 and out["sum"][1] is None
    assert {type(t.grad_fn).__name__ for t in (out["pair"].first, out["sum"][0])} == {"_NodeBackward"}
    with torch.no_grad():
        module(Pair(tensors[0], 7), [tensors[1]], {"x": tensors[2]})
    assert all(seen is tensor for seen, tensor in zip(module.seen, tensors, strict=True))


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x])


@pytest.mark.parametrize(("hooked", "added"), [(False, 0.0), (True, 2.0)])
def test_gradients_of_a_module_are_added_up_before_others(hooked: bool, added: float, linear_back: None) -> None:
    """In float32 adding 1 to 2**24 changes nothing, adding 2 does."""
    module, leaf = Twice(), torch.zeros(1, requires_grad=True)
    if hooked:
        sum_as_stage_3(module)
    x = leaf * 1
    twice = module(x)
    large = x * 2.0**24  # made last, its gradient is there first
    (twice.sum() + large.sum()).backward()
    assert float(leaf.grad) - 2.0**24 == added


def test_the_norm_does_not_tell_its_order() -> None:
    gradients = [torch.tensor([1e4]), torch.full((1000,), 1e-3), torch.tensor([3.0, 4.0])]
    expected = (1e8 + 1000 * float(torch.tensor(1e-3)) ** 2 + 25) ** 0.5
    assert float(norm_of(gradients)) == pytest.approx(expected, rel=1e-15)
    assert float(norm_of(gradients[::-1])) == pytest.approx(expected, rel=1e-15)
    assert float(norm_of([])) == 0.0


@pytest.mark.parametrize(("limit", "scale"), [(2.5, 0.5), (6.0, 1.0)])
def test_clipping(limit: float, scale: float) -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
    clip(gradients, limit, 5.0)
    assert [float(g) for g in gradients] == pytest.approx([3 * scale, 4 * scale], rel=1e-6)


def test_rounds_are_added_up_and_a_parameter_may_be_missed_by_any() -> None:
    """Three rounds reach the first parameter, the second one and the third none."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    rounds = SummedRounds(parameters)
    for number in range(3):
        parameters[0].grad = torch.tensor([10.0**number])
        if number == 1:
            parameters[1].grad = torch.tensor([5.0])
        rounds.add(last=number == 2)
        assert number == 2 or all(parameter.grad is None for parameter in parameters)
    assert float(parameters[0].grad) == 111.0 and float(parameters[1].grad) == 5.0 and parameters[2].grad is None
    parameters[0].grad = torch.tensor([1.0])
    rounds.add(last=True)
    assert float(parameters[0].grad) == 1.0, "something of the step before was left"

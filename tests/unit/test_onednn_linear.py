"""Linear layers through oneDNN: the same numbers, where they may go there, and nowhere else."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import onednn_linear as module
from model.onednn_linear import AVAILABLE, FrozenLinear, onednn_linear, use_onednn

CPU = torch.device("cpu")

needs_one_dnn = pytest.mark.skipif(not AVAILABLE, reason="this torch has no oneDNN")


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what went through oneDNN."""
    seen: list[tuple[int, ...]] = []
    real = torch.ops.mkldnn._linear_pointwise

    def watched(inputs: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(tuple(inputs.shape))
        return real(inputs, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    return seen


@needs_one_dnn
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (1, 1, 48), (2, 3, 48), (1, 5, 48), (2, 1, 3, 48), (300, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers(shape: tuple[int, ...], bias: bool, through: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(48, 40, bias=bias), torch.randn(*shape)
    turned = inputs.transpose(0, -2).contiguous().transpose(0, -2)  # the same values in another order in memory
    with torch.no_grad():
        expected = layer(inputs)
        for given in (inputs, turned):
            with onednn_linear(CPU):
                found = layer(given)
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-5)
    assert through == [shape, shape]


@needs_one_dnn
def test_what_does_not_suit_goes_its_own_way(through: list[tuple[int, ...]]) -> None:
    weight = torch.randn(40, 48)
    with torch.no_grad(), onednn_linear(CPU):
        F.linear(torch.randn(48), weight)
        F.linear(torch.randn(3, 40), weight.t())
        F.linear(torch.randn(3, 48).double(), weight.double())
        F.linear(torch.randn(3, 48).bfloat16(), weight.bfloat16())
        assert F.linear(torch.randn(0, 48), weight).shape == (0, 40)
    assert through == []
    with onednn_linear(CPU):  # gradients are wanted
        F.linear(torch.randn(3, 48), weight)
    with torch.no_grad(), onednn_linear(torch.device("meta")):
        F.linear(torch.randn(3, 48), weight)
    with torch.no_grad():
        F.linear(torch.randn(3, 48), weight)
    assert through == []


def frozen(monkeypatch: pytest.MonkeyPatch, bias: bool = True) -> nn.Linear:
    monkeypatch.setattr(module, "SMALLEST_WEIGHT", 48 * 40)
    torch.manual_seed(0)
    layer = nn.Linear(48, 40, bias=bias).requires_grad_(False)
    assert use_onednn(nn.Sequential(layer, nn.Linear(40, 40).requires_grad_(False), nn.Linear(48, 40))) == 1
    assert isinstance(layer, FrozenLinear)
    return layer


@needs_one_dnn
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_layers_pass_the_same_gradient_on(
    bias: bool, through: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = frozen(monkeypatch, bias)
    inputs, pull = torch.randn(2, 7, 48, requires_grad=True), torch.randn(2, 7, 40)
    plain = F.linear(inputs, layer.weight, layer.bias)
    (expected,) = torch.autograd.grad((plain * pull).sum(), inputs)
    found = layer(inputs)
    assert through == [(2, 7, 48)]
    (gradient,) = torch.autograd.grad((found * pull).sum(), inputs)
    assert through == [(2, 7, 48), (2, 7, 40)]
    assert torch.allclose(found, plain, atol=1e-5) and torch.allclose(gradient, expected, atol=1e-5)
    # Where no gradient is to pass, none is prepared for.
    assert not layer(inputs.detach()).requires_grad and through[-1] == (2, 7, 48)


@needs_one_dnn
def test_frozen_layers_that_do_not_suit_go_their_own_way(
    through: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = frozen(monkeypatch)
    inputs = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(layer(inputs), F.linear(inputs, layer.weight, layer.bias))
    finally:
        torch.use_deterministic_algorithms(False)
    layer.double()(inputs.double())
    layer.float().requires_grad_(True)
    layer(inputs).sum().backward()
    assert torch.allclose(layer.weight.grad, inputs.detach().sum(dim=0).expand(40, 48), atol=1e-5)
    assert through == []

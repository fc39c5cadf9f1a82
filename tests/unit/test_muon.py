"""Muon: orthogonal updates for hidden matrices, AdamW for the rest, one set of groups and states."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from demo.muon import ADAMW_RMS, MOMENTUM, Muon, hidden_matrices, make_muon, orthogonal, shared_out
from tests.unit.engine_toys import Toy, collate, cut, make_samples, make_toy
from utils.engine.plain_engine import PlainEngine
from utils.engine.stepping import OptimizerSettings, make_optimizer, set_learning_rate

CPU = torch.device("cpu")
RATE = 1e-2


def plain_engine(model: Toy) -> PlainEngine:
    """The plain engine, handed Muon."""
    settings = OptimizerSettings()
    return PlainEngine(model, settings, "fp32", CPU, make_muon(model, settings))


@pytest.mark.parametrize("shape", [(8, 8), (6, 16), (16, 6)])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.stack([torch.randn(shape), 1e-4 * torch.randn(shape), torch.zeros(shape)])
    found = orthogonal(matrices)
    assert found.shape == matrices.shape and not found[2].any()
    values = torch.linalg.svdvals(found[:2])
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices[0], full_matrices=False)
    apart = (found[0] - left @ right).norm() / (left @ right).norm()
    assert apart < 0.35, "the same singular vectors"


def test_one_update_by_hand() -> None:
    """A diagonal gradient keeps its axes; its update has the size that AdamW's have."""
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = make_muon(layer, OptimizerSettings())
    set_learning_rate(optimizer, RATE)
    layer.weight.grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    optimizer.step()
    # Nesterov's first update: the gradient on its way to its own (1 - momentum) share; its scale does not matter.
    towards = 1 + (1 - MOMENTUM - 1) * MOMENTUM
    update = orthogonal((layer.weight.grad * towards)[None])[0]
    torch.testing.assert_close(layer.weight.detach(), -RATE * ADAMW_RMS * 4**0.5 * update)
    off_diagonal = layer.weight.detach() - torch.diag(layer.weight.detach().diagonal())
    assert off_diagonal.abs().max() < 1e-6 * RATE
    assert layer.weight.detach().square().mean().sqrt().item() == pytest.approx(ADAMW_RMS * RATE, rel=0.3)


def test_what_is_no_hidden_matrix_is_adamws() -> None:
    """Biases step as AdamW steps them; frozen parameters and the head that scores words are no hidden matrices."""
    toy, twin = make_toy(warm=True), make_toy(warm=True)
    ours, adamw = make_muon(toy, OptimizerSettings()), make_optimizer(twin, OptimizerSettings())
    batch = collate(make_samples(8))
    for model, optimizer in ((toy, ours), (twin, adamw)):
        set_learning_rate(optimizer, RATE)
        sum(term.sum for term in model(**batch.as_kwargs()).losses.values()).backward()
        optimizer.step()
    for name, parameter in toy.named_parameters():
        same = torch.equal(parameter, dict(twin.named_parameters())[name])
        assert same == (not parameter.requires_grad or parameter.ndim < 2), name
    listed = [p for group in ours.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in toy.parameters() if p.requires_grad}

    class Speaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    speaking = Speaking()
    assert hidden_matrices(speaking) == {speaking.hidden.weight}


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    steps = [cut(make_samples(4, seed), 1, 1, 0) for seed in range(4)]
    straight, first, second = map(plain_engine, [make_toy(warm=True) for _ in range(3)])
    for step in steps:
        straight.train_step(step, RATE)
    for step in steps[:2]:
        first.train_step(step, RATE)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for step in steps[2:]:
        second.train_step(step, RATE)
    assert isinstance(second.optimizer, Muon)
    for one, other in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_work_and_all_get_all_of_it(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five matrices of two shapes: every rank sends what it made, padded to the longest, and finds all in order."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in [(4, 6), (6, 4), (4, 6), (6, 4), (4, 6)]]
    alone = [orthogonal(matrix[None])[0] for matrix in matrices]
    sent: dict[int, torch.Tensor] = {}

    def gather(received: list[torch.Tensor], own: torch.Tensor) -> None:
        sent[dist.get_rank()] = own.clone()
        for rank, tensor in enumerate(received):
            if rank in sent:
                tensor.copy_(sent[rank])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "all_gather", gather)
    for _ in range(2):  # once to hear what all send, once to be given it
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            found = shared_out(matrices)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)
    made = {rank: sum(matrix.numel() for matrix in matrices[rank::ranks]) for rank in range(ranks)}
    assert {rank: len(tensor) for rank, tensor in sent.items()} == (
        {} if ranks == 1 else dict.fromkeys(made, max(made.values()))
    )

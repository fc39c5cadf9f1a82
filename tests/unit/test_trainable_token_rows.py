"""Of the tables only the rows of new tokens train; the results are those of tables whose other rows are held."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.tiny_batches import TWO, make_batch, total_loss
from tests.unit.tiny_pixellm import make_model
from utils.checkpoints.builder import BuildError, TrainingRecipe, choose_trainable, load_weights_into
from utils.checkpoints.export import load_and_merge
from utils.checkpoints.trainable_token_rows import join_tables, make_rows_trainable, split_tables

RECIPE = {"lora_r": 2, "lora_dropout": 0.0}


def test_only_the_new_rows_train() -> None:
    built = make_model()
    model, first = built.model, min(built.model.config.seg_token_ids)
    before = model.get_input_embeddings().weight.detach().clone()
    trained = choose_trainable(model, TrainingRecipe(**RECIPE, train_new_tokens_only=True))
    tables = {name: p for name, p in model.named_parameters() if "parametrizations" in name}
    assert len(tables) == 4 and sum(name in trained for name in tables) == 2
    for name, part in tables.items():
        rows = len(before)
        assert len(part) == (rows - first if part.requires_grad else first), name
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_tied_tables_stay_tied() -> None:
    table = nn.Embedding(6, 3)
    head = nn.Linear(3, 6, bias=False)
    head.weight = table.weight
    make_rows_trainable([table, head], 4)
    both = nn.ModuleList([table, head])
    assert [tuple(p.shape) for p in both.parameters()] == [(4, 3), (2, 3)]
    with torch.no_grad():
        table.parametrizations["weight"].original1.add_(1.0)
    assert torch.equal(head.weight, table.weight)
    with pytest.raises(BuildError, match=r"begin at row 6 of a table of 6 rows"):
        make_rows_trainable([nn.Embedding(6, 3)], 6)


def test_names_go_there_and_back(tmp_path: Path) -> None:
    built = make_model()
    plain = {name: value.clone() for name, value in built.model.state_dict().items()}
    choose_trainable(built.model, TrainingRecipe(lora_r=0, train_new_tokens_only=True))
    parted = built.model.state_dict()
    assert parted.keys() != plain.keys()
    again = join_tables(parted)
    assert again.keys() == plain.keys() and all(torch.equal(again[name], plain[name]) for name in plain)
    assert split_tables(built.model, plain).keys() == parted.keys()
    load_weights_into(built.model, {name: value + 0 for name, value in plain.items()}, "plain")


def test_what_it_trains_is_merged_into_whole_tables() -> None:
    built = make_model()
    choose_trainable(built.model, TrainingRecipe(lora_r=2, train_new_tokens_only=True))
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    trained = {name: value.clone() for name, value in built.model.state_dict().items()}
    fresh = make_model(seed=5)
    load_and_merge(fresh, trained, "trained", 16)
    wanted, found = built.model.get_output_embeddings().weight, fresh.model.get_output_embeddings().weight
    assert isinstance(found, nn.Parameter) and torch.equal(found, wanted)
    assert not any("parametrizations" in name for name in fresh.model.state_dict())


def test_gradients_are_those_of_the_whole_table() -> None:
    found = []
    for new_only in (False, True):
        built = make_model()
        model, batch = built.model.eval(), make_batch(built.processor, [(0, TWO)], [(32, 32)])
        choose_trainable(model, TrainingRecipe(lora_r=0, train_new_tokens_only=new_only))
        total_loss(model, model(**batch).losses).backward()
        found.append(model)
    first = min(found[0].config.seg_token_ids)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        whole = getattr(found[0], table)().weight.grad
        rows = getattr(found[1], table)().parametrizations["weight"].original1.grad
        assert whole[first:].abs().sum() > 0 and torch.allclose(rows, whole[first:], rtol=1e-6, atol=1e-9)

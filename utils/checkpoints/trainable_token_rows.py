"""Tables of which only the new rows train: those of the seg tokens and of what was added with them.

The rest of a table stays frozen in the type it is stored in, without gradients or moments. A table is put together of
its two parts where it is used, and has its own name again where it is written.
"""

import re
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from utils.checkpoints.folders import BuildError

_PARTS = re.compile(r"^(?P<module>.*)\.parametrizations\.weight\.original(?P<part>[01])$")
Weights = dict[str, torch.Tensor]


class SplitTable(nn.Module):
    """A table (rows, width) kept as two: the first `known` rows, which are frozen, and the new ones below them."""

    def __init__(self, known: int) -> None:
        super().__init__()
        self.known = known

    def forward(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Both parts as one table, in the type of the old one."""
        return torch.cat([old, new.to(old.dtype)])

    def right_inverse(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two parts, in memory of their own."""
        return table[: self.known].clone(), table[self.known :].clone()


def make_rows_trainable(tables: list[Any], first: int) -> None:
    """Let of every module's `weight` only the rows from number `first` on train; tied tables stay tied.

    Raises:
        BuildError: there are no such rows.
    """
    done: dict[int, Any] = {}
    for module in tables:
        weight = module.weight
        if not 0 < first < len(weight):
            raise BuildError(
                f"--train_new_tokens_only: the new tokens begin at row {first} of a table of {len(weight)} rows, so "
                "that nothing, or all of it, would train: leave the flag out"
            )
        key = id(weight)
        parametrize.register_parametrization(module, "weight", SplitTable(first), unsafe=True)
        parts = table_parts(module)
        if key in done:
            twin = table_parts(done[key])
            parts.original0, parts.original1 = twin.original0, twin.original1
        done.setdefault(key, module)
        parts.original0.requires_grad_(False)
        parts.original1.requires_grad_(True)


def table_parts(module: Any) -> Any:
    """Where a module keeps the parts of its table: original0, original1, and how to put them together."""
    return module.parametrizations["weight"]


def join_tables(weights: Weights) -> Weights:
    """A state dict in which every table that was in two parts is one, under its own name."""
    found = dict(weights)
    for name in weights:
        match = _PARTS.match(name)
        if match and match["part"] == "0":
            stem = f"{match['module']}.parametrizations.weight.original"
            old, new = found.pop(f"{stem}0"), found.pop(f"{stem}1")
            wide = torch.promote_types(old.dtype, new.dtype)
            found[f"{match['module']}.weight"] = torch.cat([old.to(wide), new.to(wide)])
    return found


def split_tables(model: nn.Module, weights: Weights) -> Weights:
    """A state dict with whole tables in the parts that `model` has them in."""
    found = dict(weights)
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and f"{name}.weight" in found:
            table = found.pop(f"{name}.weight")
            (split,) = table_parts(module)
            for part, value in enumerate(split.right_inverse(table)):
                found[f"{name}.parametrizations.weight.original{part}"] = value
    return found

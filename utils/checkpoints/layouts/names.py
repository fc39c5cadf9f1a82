"""Names of tensors: patterns, in which {} is a number and * the rest, and pairs (theirs, ours) that translate."""

import re
from collections.abc import Callable, Iterable, Sequence

from utils.checkpoints.tensor_files import StoredTensors

NamePair = tuple[str, str]
# Tables that every program computes for itself.
COMPUTED = ("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "*.position_ids")
PEFT_PREFIX = "base_model.model."
"""PEFT puts this before every name of the model that it wraps."""


def match_name(pattern: str, name: str) -> tuple[str, ...] | None:
    """What stands for the numbers and the rest of a pattern; None where the name does not fit it."""
    expression = re.escape(pattern).replace(r"\{\}", r"(\d+)").replace(r"\*", r"(.+)")
    found = re.fullmatch(expression, name)
    return found.groups() if found else None


def has_names(names: Iterable[str], *patterns: str) -> bool:
    """Whether every pattern fits one of the names."""
    names = list(names)
    return all(any(match_name(pattern, name) is not None for name in names) for pattern in patterns)


def translate_name(name: str, pairs: Iterable[NamePair]) -> str | None:
    """A name translated by the first pair whose left pattern it fits; None where it fits none."""
    for theirs, ours in pairs:
        groups = match_name(theirs, name)
        if groups is not None:
            return ours.replace("*", "{}").format(*groups)
    return None


def rename_tensors(
    tensors: StoredTensors, pairs: Sequence[NamePair], why_not: str
) -> tuple[StoredTensors, Callable[[str], str], dict[str, str]]:
    """Tensors under our names.

    Returns:
        They; our name of a tensor -> theirs, also of one that is not there; their names that have no place, and why.
    """
    found: StoredTensors = {}
    used: dict[NamePair, None] = {}
    ignored: dict[str, str] = {}
    for name, stored in tensors.items():
        pair = next((pair for pair in pairs if match_name(pair[0], name) is not None), None)
        if any(match_name(pattern, name) is not None for pattern in COMPUTED):
            ignored[name] = "computed, not learned"
        elif pair is None:
            ignored[name] = why_not
        else:
            used[pair] = None
            found[str(translate_name(name, [pair]))] = stored
    back = [(ours, theirs) for theirs, ours in (*used, *pairs)]
    return found, lambda name: translate_name(name, back) or name, ignored


def strip_peft_prefix(tensors: StoredTensors) -> tuple[StoredTensors, bool]:
    """Tensors by the names they had before PEFT wrapped the model, and whether it had."""
    if not any(name.startswith(PEFT_PREFIX) for name in tensors):
        return tensors, False
    return {name.removeprefix(PEFT_PREFIX): stored for name, stored in tensors.items()}, True

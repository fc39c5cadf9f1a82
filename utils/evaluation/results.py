"""results.json: its content, its place, and how it is read again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli.errors import UserError
from utils.evaluation.aggregate import QuestionScores, intervals
from utils.evaluation.protocols import PROTOCOLS

RESULTS = "results.json"


def add_intervals(scores: Mapping[str, Any], figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """The scores that `figures` gave, with their bootstrap intervals: those of a data set beside its scores."""
    found = intervals(figures)
    return merge_results(scores, {"datasets": found.pop("datasets"), "text": found.pop("text")}) | {"intervals": found}


def merge_results(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both; what both hold as a mapping holds what either's does, and else the other's value stands.

    >>> merge_results({"a": {"n": 1}, "b": None}, {"a": {"m": 2}, "b": {}})
    {'a': {'n': 1, 'm': 2}, 'b': None}
    """
    found = dict(one)
    for name, value in other.items():
        if isinstance(value, Mapping):
            found[name] = merge_results(found[name], value) if isinstance(found.get(name), Mapping) else (value or None)
        else:
            found[name] = value
    return found


def protocol_facts(protocols: Sequence[str]) -> dict[str, Any]:
    """The protocols by name, and what each means."""
    return {"protocol": ",".join(protocols), "protocols": {name: PROTOCOLS[name] for name in protocols}}


def read_results(folder: Path) -> dict[str, Any]:
    """The results in a folder. UserError when there are none."""
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a folder that evaluate.py wrote") from error
    except ValueError:
        raise UserError(f"{path} is not valid JSON: it was changed or cut off, score again") from None
    if not isinstance(found, dict) or "datasets" not in found:
        raise UserError(f"{path} holds no scores of data sets: give a folder that evaluate.py wrote")
    return found

"""Reading the golden set, with a record of what was read: a number nobody compared makes a test fail.

A group is `<group>.safetensors` and `<group>.json`. PIXELLM_GOLDEN names another folder in the same layout; every size
is taken from the files, so its sizes, seeds and cases may differ. A file that is missing fails the tests that need it.

The copy in `data` is what `trim.py` leaves of a set: whole cases are dropped, no number is changed.
"""

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"
VARIABLE = "PIXELLM_GOLDEN"

# Tolerances of the set's README, for float32.
HIDDEN_ATOL = 1e-4
MASK_ATOL = 2e-4
LOGIT_ROUNDING = 2e-5  # how far masks moved between float32 and float64
LOSS_RTOL = 1e-4
LOGIT_ATOL = 1e-3  # of tens: logits that force an answer are large
GRADIENT_RTOL, GRADIENT_ATOL = 2e-3, 1e-6
PIXEL_ATOL = 1e-5
METRIC_ATOL = 1e-5
COST_ATOL = 1e-4
MERGED_ATOL = 1e-6

NOTHING = "nothing"

FactPath = tuple[str | int, ...]


def folder() -> Path:
    """The golden set in use."""
    named = os.environ.get(VARIABLE)
    found = Path(named) if named else DATA
    if not found.is_dir():
        raise FileNotFoundError(f"{VARIABLE}={named} is not a folder; name one in the layout of {DATA}, or unset it")
    return found


def path_of(file: str) -> Path:
    """A file of the set; one that is missing fails the test that asks for it, it never skips."""
    path = folder() / file
    if not path.is_file():
        raise FileNotFoundError(f"the golden set {folder()} holds no {file}: complete it, or name another folder")
    return path


@functools.cache
def read_json(name: str) -> Any:
    return json.loads(path_of(f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def read_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(path_of(f"{name}.safetensors"))


def _is_branch(value: Any) -> bool:
    """Objects and lists of objects are walked into; anything else is read as one fact."""
    if isinstance(value, dict):
        return True
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _children(value: Any) -> Iterator[tuple[str | int, Any]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)


def _leaves(value: Any, path: FactPath = ()) -> Iterator[FactPath]:
    if not _is_branch(value):
        yield path
        return
    for key, child in _children(value):
        yield from _leaves(child, (*path, key))


class Facts:
    """A view of a JSON tree that crosses off every leaf handed out."""

    def __init__(self, value: Any, path: FactPath, unread: set[FactPath]) -> None:
        self._value, self._path, self._unread = value, path, unread

    def __getitem__(self, key: str | int) -> Any:
        child, path = self._value[key], (*self._path, key)
        if _is_branch(child):
            return Facts(child, path, self._unread)
        self._unread.discard(path)
        return child

    def __contains__(self, key: str | int) -> bool:
        return key in self._value

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[str | int]:
        """Names (or indices) of the children; reads nothing."""
        return (key for key, _ in _children(self._value))

    def read_all(self) -> Any:
        """The whole tree as plain data, all of it crossed off."""
        self._unread.difference_update({path for path in self._unread if path[: len(self._path)] == self._path})
        return self._value


def strides(name: str) -> tuple[int, int]:
    """Strides over channels and over pixels that a tensor's name tells ("…_every8th_channel", "…_every2nd_pixel")."""

    def stride(axis: str) -> int:
        found = re.search(rf"every(\d+)(?:st|nd|rd|th)_{axis}", name)
        return int(found.group(1)) if found else 1

    return stride("channel"), stride("pixel")


def thin_out(tensor: torch.Tensor, channel_stride: int, pixel_stride: int) -> torch.Tensor:
    """(…, H, W), or (…, C, H, W) where channels are thinned, at the strides at which it was stored."""
    tensor = tensor[..., ::pixel_stride, ::pixel_stride]
    return tensor[..., ::channel_stride, :, :] if channel_stride > 1 else tensor


class Reading:
    """One case of a group (or all of a group that has no cases): everything in it must be read before the block ends.

    Differences are collected, so that one run tells all of them.
    """

    def __init__(self, group: str, facts: Any, tensors: dict[str, torch.Tensor], label: str) -> None:
        self.label = f"{group}/{label}" if label else group
        self._tensors = tensors
        self._unread_tensors = set(tensors)
        self._unread_facts = set(_leaves(facts))
        self.facts = Facts(facts, (), self._unread_facts)
        self._problems: list[str] = []
        self.deviations: dict[str, float] = {}

    def __enter__(self) -> "Reading":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, deviation in self.deviations.items():
            print(f"{self.label}: {name}: largest deviation {deviation:.3g}")
        if kind is not None:
            return
        problems = [*self._problems]
        problems += [f"tensor {name!r} was never compared" for name in sorted(self._unread_tensors)]
        problems += [
            f"fact {'.'.join(map(str, path))!r} was never compared" for path in sorted(self._unread_facts, key=str)
        ]
        assert not problems, f"{self.label}: {len(problems)} problem(s)\n  " + "\n  ".join(problems)

    def names(self, pattern: str = "") -> list[str]:
        """Names of the stored tensors in which the regular expression `pattern` is found."""
        return [name for name in sorted(self._tensors) if re.search(pattern, name)]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor, crossed off."""
        self._unread_tensors.discard(name)
        return self._tensors[name]

    def per_image(self, name: str) -> list[torch.Tensor]:
        """`name`.0, `name`.1, … for as many images as the case has."""
        count = len(self.names(rf"^{re.escape(name)}\.\d+$"))
        return [self.tensor(f"{name}.{image}") for image in range(count)]

    def compare(
        self, name: str, found: torch.Tensor, expected: torch.Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> None:
        """Compare two tensors; `close` does it with a stored one."""
        found, expected = found.detach().to(torch.float64), expected.to(torch.float64)
        if found.shape != expected.shape:
            self._problems.append(f"{name}: found shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
            return
        difference = (found - expected).abs()
        if difference.numel():
            self.deviations[name] = max(self.deviations.get(name, 0.0), float(difference.max()))
        within = difference <= atol + rtol * expected.abs()  # False for NaN
        if not bool(within.all()):
            self._problems.append(
                f"{name}: {int((~within).sum())} of {within.numel()} numbers differ, by at most "
                f"{float(difference.max()):.3g} (allowed: {atol:g} + {rtol:g} of the number)"
            )

    def close(self, name: str, found: torch.Tensor, *, atol: float = 0.0, rtol: float = 0.0) -> None:
        """Compare `found` with the stored tensor `name`; with no tolerance they must be equal."""
        self.compare(name, found, self.tensor(name), atol=atol, rtol=rtol)

    def number(
        self, name: str, found: float | torch.Tensor, expected: float, *, atol: float = 0.0, rtol: float = 0.0
    ) -> None:
        """Compare a number with one of the facts."""
        self.compare(
            name, torch.as_tensor(found).reshape(()), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=rtol
        )

    def same(self, name: str, found: Any, expected: Any) -> None:
        """Compare anything else: lists, shapes, names."""
        if found != expected:
            self._problems.append(f"{name}: found {found!r}, expected {expected!r}")

    def check(self, holds: bool, problem: str) -> None:
        """Record `problem` unless `holds`."""
        if not holds:
            self._problems.append(problem)


def read_group(group: str) -> Reading:
    """A group that is one case."""
    return Reading(group, read_json(group), read_tensors(group), "")


def _facts_at(group: str, path: FactPath) -> Any:
    facts = read_json(group)
    for key in path:
        facts = facts[key]
    return facts


def read_case(group: str, case: str, *path: str | int) -> Reading:
    """The tensors of a group whose names start with "`case`." (less that prefix) and the facts at `path`."""
    facts = _facts_at(group, path)
    prefix = f"{case}."
    tensors = {name[len(prefix) :]: tensor for name, tensor in read_tensors(group).items() if name.startswith(prefix)}
    return Reading(group, facts, tensors, case)


def assert_all_in_cases(
    group: str, cases: Iterable[str], fact_paths: Iterable[FactPath], tensors: Iterable[str] = ()
) -> None:
    """Every tensor of a group belongs to one of its cases or is one of `tensors`, which all cases share, and every fact
    lies under one of `fact_paths`.
    """
    cases, fact_paths = list(cases), list(fact_paths)
    shared = set(tensors)
    absent = shared - set(read_tensors(group))
    assert not absent, f"{group}: not in the file: {sorted(absent)}"
    strays: list[Any] = [
        name
        for name in read_tensors(group)
        if name not in shared and not any(name.startswith(f"{case}.") for case in cases)
    ]
    for leaf in _leaves(read_json(group)):
        if not any(leaf[: len(path)] == path for path in fact_paths):
            strays.append(".".join(map(str, leaf)))
    assert cases and NOTHING not in cases, f"{group}: no cases at all"
    assert not strays, f"{group}: belong to no case, so nothing compares them: {strays}"


def case_names(group: str, *path: str) -> list[str]:
    """The cases of a group, for parametrisation: the objects among the facts at `path`, by key or by their "name".

    Where there are none, or the file is missing, the one name `NOTHING`: a test without parameters would be skipped,
    one with a case that is not there fails.
    """
    if not (folder() / f"{group}.json").is_file():
        return [NOTHING]
    facts = _facts_at(group, path)
    if isinstance(facts, list):
        return [entry["name"] for entry in facts] or [NOTHING]
    return [name for name, value in facts.items() if isinstance(value, dict)] or [NOTHING]


def score_atol(mask_logits: torch.Tensor) -> float:
    """Tolerance of the scores of masks (Q, H, W): rounding takes a pixel with a logit next to zero in or out, which
    moves a mean of probabilities above a half by at most a half of the pixel's share.
    """
    near = (mask_logits.abs() < LOGIT_ROUNDING).flatten(1).sum(1)
    inside = (mask_logits > 0).flatten(1).sum(1).clamp(min=1)
    return HIDDEN_ATOL + float((near / inside / 2).max() if len(mask_logits) else 0.0)


def stored_stride(full: int, stored: int, documented: int) -> int:
    """The stride at which `stored` of `full` positions were kept: the layout's documented one where it fits."""
    if math.ceil(full / documented) == stored:
        return documented
    return math.ceil(full / stored)

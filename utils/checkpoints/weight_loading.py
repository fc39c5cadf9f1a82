"""A model of empty tensors, filled one tensor at a time: nothing is held twice, nothing is initialised and thrown away.

The model is built on torch's meta device, where tensors have shapes and no memory. Then every tensor is read from its
file into the type that was asked for; what no file holds is initialised; what a file holds and nothing asks for is an
error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from model.configuration_pixellm import PixelLMConfig
from model.modeling_pixellm import PixelLMForCausalLM
from utils.checkpoints.folders import BuildError
from utils.checkpoints.load_report import LoadReport
from utils.checkpoints.tensor_files import StoredTensor, StoredTensors, all_finite
from utils.checkpoints.trainable_token_rows import join_tables, split_tables

MISMATCH = "the checkpoint and the flags that shape the model do not match"
# New rows of a table begin at the mean of the others, this share of their deviation around it.
ROW_NOISE = 0.01
_ROWS_TOGETHER = 4096
# Called with a parameter as soon as it has its numbers, to keep a part of them only, say.
OnParameterLoaded = Callable[[nn.Parameter], None]


def empty_model(config: PixelLMConfig, attn_implementation: str) -> PixelLMForCausalLM:
    """A model whose tensors have shapes and no memory."""
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        return PixelLMForCausalLM(config)


@dataclass(frozen=True)
class Origin:
    """Where a part of the model comes from, for messages.

    prefix: how the part's names begin in the model. place: the checkpoint. theirs: our name of a tensor to the one it
    has there. advice: what to do when names or shapes do not match.
    """

    prefix: str
    place: str
    theirs: Callable[[str], str] = str
    advice: str = "copy the model again"


def fill_model(
    model: PixelLMForCausalLM,
    tensors: StoredTensors,
    origins: Sequence[Origin],
    *,
    dtype: torch.dtype | None,
    allow_missing: Mapping[str, str],
    rows: int,
    on_parameter_loaded: OnParameterLoaded | None = None,
) -> LoadReport:
    """Give every tensor of an empty model its numbers.

    Args:
        tensors: by the names they have in the model.
        origins: a tensor's is the first whose prefix its name begins with.
        dtype: of all parameters and saved buffers; None keeps each in the type it is stored in, new ones in float32.
        allow_missing: name, or beginning of names up to a dot, of tensors that may be absent, and why they are new.
        rows: of the stored embedding table and head; the model's further ones are drawn around the mean of those.
        on_parameter_loaded: called with every parameter, once: with those of the language model and the tower before
            the next one is read.

    Raises:
        BuildError: a tensor is missing, superfluous, of another shape, or not finite; the sentence names it.
    """
    own = dict(model.state_dict(keep_vars=True))
    owners = _owners(model)
    tables = _token_tables(model)
    expected = {
        name: ((rows, *value.shape[1:]) if id(value) in tables else tuple(value.shape)) for name, value in own.items()
    }
    stored_ids = {id(own[name]) for name in tensors if name in own}
    missing_keys = [name for name, value in own.items() if id(value) not in stored_ids]
    refuse_mismatch(
        origins,
        {name: (stored.shape, expected[name]) for name, stored in tensors.items() if name in own},
        [name for name in missing_keys if _why_missing(name, allow_missing) is None],
        [(name, stored.name) for name, stored in tensors.items() if name not in own],
    )
    report = LoadReport(loaded=list(tensors))
    done: set[int] = set()
    for name, stored in tensors.items():
        value = _read(stored, tuple(own[name].shape), dtype)
        if value.shape != stored.shape:
            initialize_new_rows(value.view(len(value), -1), rows)
        full = _put(owners, own[name], value)
        # Initialisation looks at the shapes of our own parts, which are small, once more.
        small = any(getattr(module, "_is_own_part", False) for module, _ in owners[id(own[name])])
        if on_parameter_loaded is not None and isinstance(full, nn.Parameter) and not small:
            on_parameter_loaded(full)
            done.add(id(full))
    for name in missing_keys:
        report.newly_initialized[name] = _why_missing(name, allow_missing) or ""
        _put(owners, own[name], torch.empty(own[name].shape, dtype=dtype or torch.float32), ready=False)
    for _, buffer in list(model.named_non_persistent_buffers()):
        _put(owners, buffer, torch.empty(buffer.shape, dtype=buffer.dtype), ready=False)
    model.initialize_weights()
    _remove_marks(model)
    for parameter in model.parameters() if on_parameter_loaded is not None else ():
        if id(parameter) not in done and on_parameter_loaded is not None:
            on_parameter_loaded(parameter)
    return report


def load_weights_into(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> LoadReport:
    """Fill a model strictly.

    Raises:
        BuildError: a tensor is missing, superfluous, of another shape, or not finite; the sentence names it.
    """
    weights = split_tables(model, join_tables(weights))
    own = model.state_dict()
    missing_keys = [name for name in own if name not in weights]
    refuse_mismatch(
        [Origin("", source, advice=MISMATCH)],
        {name: (value.shape, own[name].shape) for name, value in weights.items() if name in own},
        [name for name in missing_keys if not _is_tied(own, name, weights)],
        [(name, name) for name in weights if name not in own],
    )
    for name, value in weights.items():
        if not all_finite(value):
            raise BuildError(
                f"{source}: tensor {name!r} holds values that are not finite: take a checkpoint from before that"
            )
    model.load_state_dict(weights, strict=False)
    return LoadReport(loaded=list(weights))


def _is_tied(own: dict[str, torch.Tensor], name: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor that a file leaves out is the same storage as one it holds."""
    return any(other in weights and own[other].data_ptr() == own[name].data_ptr() for other in own if other != name)


def initialize_new_rows(table: torch.Tensor, known: int) -> None:
    """Draw the rows of a table (rows, width) from number `known` on around the mean of those before it, in place."""
    width = table.shape[1]
    total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for piece in table[:known].split(_ROWS_TOGETHER):
        rows = piece.double()
        total += rows.sum(0)
        squares += rows.square().sum(0)
    mean = total / known
    deviation = (squares / known - mean.square()).clamp(min=0).sqrt()
    noise = torch.randn(table.shape[0] - known, width) * deviation * ROW_NOISE
    table[known:] = (mean + noise).to(table.dtype)


def _token_tables(model: PixelLMForCausalLM) -> set[int]:
    """The tensors with a row for every token."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(table) for part in parts if part is not None for table in part.parameters(recurse=False)}


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each tensor the places in the model where it is kept: tied ones have several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                found.setdefault(id(value), []).append((module, leaf))
    return found


def _put(
    owners: dict[int, list[tuple[nn.Module, str]]], empty: torch.Tensor, value: torch.Tensor, ready: bool = True
) -> torch.Tensor:
    """Replace an empty tensor wherever it is kept; returns what is there now.

    ready: no initialisation may touch the value any more.
    """
    is_parameter = isinstance(empty, nn.Parameter)
    full = nn.Parameter(value, requires_grad=empty.requires_grad) if is_parameter else value
    if ready:
        full._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
    for module, leaf in owners[id(empty)]:
        (module._parameters if is_parameter else module._buffers)[leaf] = full  # type: ignore[assignment]
    return full


def _remove_marks(model: nn.Module) -> None:
    """Take transformers' marks off: they would keep modules from ever being initialised again."""
    for holder in [*model.modules(), *model.parameters(), *model.buffers()]:
        if hasattr(holder, "_is_hf_initialized"):
            del holder._is_hf_initialized


def _read(stored: StoredTensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
    """The numbers of a stored tensor, in memory of their own, at the beginning of a tensor of `shape`."""
    value = stored.read()
    if not all_finite(value):
        raise BuildError(
            f"{stored.place}: tensor {stored.name!r} holds values that are not finite: take a checkpoint from before "
            "that, or copy it again"
        )
    kept = value.dtype if dtype is None or not value.is_floating_point() else dtype
    full = torch.empty(shape, dtype=kept)
    full[: value.shape[0]].copy_(value) if shape else full.copy_(value)
    return full


def _why_missing(name: str, allow_missing: Mapping[str, str]) -> str | None:
    for beginning, reason in allow_missing.items():
        if name == beginning or name.startswith(f"{beginning}."):
            return reason
    return None


def refuse_mismatch(
    origins: Sequence[Origin],
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    missing: Sequence[str],
    unexpected: Sequence[tuple[str, str]],
) -> None:
    """BuildError that names the first tensor which does not fit; nothing where all do.

    Args:
        shapes: of every tensor that is there and has a place, as found and as expected, by our names. missing: our
            names. unexpected: our name, and the one it has there.
    """
    unlike = [(name, found, expected) for name, (found, expected) in shapes.items() if tuple(found) != tuple(expected)]
    if unlike:
        name, found, expected = unlike[0]
        detail = f" (found {list(found)}, expected {list(expected)})"
        _refuse(origins, name, None, f"has another shape than this model{detail}", len(unlike))
    if missing:
        instead = f", while {unexpected[0][1]!r} is there, which is not part of this model" if unexpected else ""
        _refuse(origins, missing[0], None, f"is missing{instead}", len(missing))
    if unexpected:
        _refuse(origins, *unexpected[0], "is not part of this model", len(unexpected))


def _refuse(origins: Sequence[Origin], name: str, theirs: str | None, problem: str, count: int) -> NoReturn:
    origin = next((origin for origin in origins if name.startswith(origin.prefix)), origins[-1])
    more = f", and {count - 1} more" if count > 1 else ""
    raise BuildError(f"{origin.place}: tensor {theirs or origin.theirs(name)!r} {problem}{more}: {origin.advice}")

"""DeepSpeed's checkpoints by parameter names: any ZeRO stage on any number of ranks goes on from any other's.

DeepSpeed's own universal checkpoints (0.19) know neither stage 0 nor a change between stages 1 or 2 and stage 3.
"""

import contextlib
import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import zero_to_fp32

from utils.cli.errors import UserError

Tensors = dict[str, torch.Tensor]
MODEL_FILE = "mp_rank_00_model_states.pt"


@dataclass
class FullState:
    """What a checkpoint holds, put together from all ranks' parts.

    weights: every parameter and buffer by name, in float32 where it trains. moments: what the optimizer keeps for every
    number of a parameter, by its key ("exp_avg") and the parameter's name. counts: what it keeps once, such as "step".
    """

    weights: Tensors
    moments: dict[str, Tensors]
    counts: dict[str, Any]


def read_layout(place: Path) -> tuple[int, int]:
    """(ZeRO stage, ranks) that wrote a checkpoint; ranks are 0 for stage 0, whose files do not depend on them."""
    files = sorted(place.glob("*_optim_states.pt"))
    if not files:
        return 0, 0
    state = torch.load(files[0], map_location="cpu", mmap=_mappable(files[0]), weights_only=False)
    return int(state["optimizer_state_dict"]["zero_stage"]), len(files)


def read_full_state(place: Path, group_names: list[list[str]]) -> FullState:
    """Put a checkpoint together.

    group_names: names of the parameters of every optimizer group, in the optimizer's order.
    """
    stage, _ = read_layout(place)
    if stage == 0:
        return _read_unsharded(place, group_names)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights = zero_to_fp32._get_fp32_state_dict_from_zero_checkpoint(str(place), False)
        parts = [_optimizer_part(path) for path in zero_to_fp32.get_optim_files(str(place))]
        described = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(str(place)))
    masters = [part["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for part in parts]
    states = [part["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"] for part in parts]
    first = states[0].get(0, {})
    keys = [key for key, value in first.items() if isinstance(value, torch.Tensor) and value.numel() > 1]
    moments: dict[str, Tensors] = {}
    for key in keys:
        # The parts of a moment lie like those of the weights, apart from the padding at their end.
        flat = [
            [state[index][key][: master.numel()] for index, master in enumerate(rank)]
            for rank, state in zip(masters, states, strict=True)
        ]
        merged: OrderedDict[str, torch.Tensor] = OrderedDict()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if stage == 3:
                zero_to_fp32._zero3_merge_trainable_params(merged, len(parts), flat, described)
            else:
                paddings = parts[0].get("param_alignment_paddings")
                zero_to_fp32._zero2_merge_trainable_params(merged, len(parts), flat, described, paddings)
        moments[key] = {name: _whole(value) for name, value in merged.items()}
    counts = {key: value for key, value in first.items() if key not in keys}
    return FullState({name: _whole(value) for name, value in weights.items()}, moments, counts)


def _read_unsharded(place: Path, group_names: list[list[str]]) -> FullState:
    saved = torch.load(place / MODEL_FILE, map_location="cpu", weights_only=False)
    state = saved["optimizer"]["state"]
    names = [name for group in group_names for name in group]
    moments: dict[str, Tensors] = {}
    counts: dict[str, Any] = {}
    for index, kept in state.items():
        for key, value in kept.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                moments.setdefault(key, {})[names[index]] = value
            else:
                counts[key] = value
    return FullState(saved["module"], moments, counts)


def _optimizer_part(path: str) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=_mappable(Path(path)), weights_only=False)["optimizer_state_dict"]


def _mappable(path: Path) -> bool:
    """Whether torch wrote the file in its newer form, whose tensors need not be read at once."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _whole(value: Any) -> torch.Tensor:
    """zero_to_fp32 gives pieces of some tensors, to be put together when they are needed."""
    return value if isinstance(value, torch.Tensor) else value.contiguous()


def load_full_state(engine: Any, whole: FullState, rank: int) -> None:
    """Give a DeepSpeed engine of any stage the state of a checkpoint. All ranks call this together.

    UserError where names or shapes differ.
    """
    stage = engine.zero_optimization_stage()
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    _put_weights(engine.module, names, whole.weights, sharded=stage == 3)
    optimizer = engine.optimizer
    if stage == 0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found = {key: values[names[parameter]] for key, values in whole.moments.items()}
                optimizer.state[parameter] = _state(found, whole.counts, parameter)
        return
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for index, flat in enumerate(flats):

        def part(values: Mapping[str, torch.Tensor], index: int = index) -> torch.Tensor:
            if stage == 3:
                return _part_of_sharded(optimizer.fp16_groups[index], names, values, rank)
            return _part_of_flat(optimizer, index, names, values, rank)

        with torch.no_grad():
            flat.copy_(part(whole.weights))
        optimizer.optimizer.state[flat] = _state({k: part(v) for k, v in whole.moments.items()}, whole.counts, flat)


def _state(moments: Tensors, counts: Mapping[str, Any], like: torch.Tensor) -> dict[str, Any]:
    state = {key: value.to(like.device, torch.float32).clone() for key, value in moments.items()}
    return state | {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in counts.items()}


def _put_weights(module: torch.nn.Module, names: Mapping[Any, str], weights: Tensors, sharded: bool) -> None:
    for parameter, name in names.items():
        if not parameter.is_floating_point():
            continue  # held quantised, as the base has it
        if name not in weights:
            raise UserError(f"the checkpoint has no parameter {name!r}: use the flags it was trained with")
        value = weights[name]
        shape = parameter.ds_shape if sharded else parameter.shape
        if tuple(value.shape) != tuple(shape):
            raise UserError(
                f"the parameter {name!r} is {tuple(value.shape)} in the checkpoint and {tuple(shape)} in this run: use "
                "the flags it was trained with"
            )
        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded)
        with gathered, torch.no_grad():
            parameter.data.copy_(value)
    for name, buffer in module.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])


def _part_of_flat(
    optimizer: Any, group: int, names: Mapping[Any, str], values: Mapping[str, torch.Tensor], rank: int
) -> torch.Tensor:
    """A rank's part of a group under stages 1 and 2: all parameters in a row, cut into equal parts."""
    row = torch.zeros(optimizer.bit16_groups_flat[group].numel())
    members, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
    for parameter, offset in zip(members, offsets, strict=True):
        row[offset : offset + parameter.numel()] = values[names[parameter]].flatten()
    size = int(optimizer.partition_size[group])
    return row[rank * size : (rank + 1) * size]


def _part_of_sharded(
    members: list[Any], names: Mapping[Any, str], values: Mapping[str, torch.Tensor], rank: int
) -> torch.Tensor:
    """A rank's part of a group under stage 3: its part of every parameter, in a row."""
    parts = []
    for parameter in members:
        size = parameter.partition_numel()
        flat = values[names[parameter]].flatten().float()
        own = torch.zeros(size)
        piece = flat[rank * size : (rank + 1) * size]
        own[: piece.numel()] = piece
        parts.append(own)
    return torch.cat(parts)

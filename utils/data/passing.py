"""How a batch travels from a worker to the run: its tensors lie as bytes in one row, masks in a bit or two per pixel.

The row lies in memory that a worker shares with the run, in one of a few slots that are used again and again; the
message between them then holds no more than the layout. Sent in messages, bytes are copied six times and more, with
new pages each time; with a shared file for every tensor, new pages alone take longer than making the batch. What finds
no slot goes as a message: where a batch is too large for one, or workers were not forked.
"""

import math
import mmap
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

SLOTS = 3
"""Batches of a worker on their way at most: two that DataLoader asks for ahead, and one that is being unpacked."""

SLOT_BYTES = 32 << 20
"""Address space of a slot; it takes memory for what batches need of it only."""

_IGNORED_PIXEL = 255
_ALIGNED = 64


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor lies in the row, and its axes in the order in which they lie in memory."""

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def read(self, row: np.ndarray) -> torch.Tensor:
        """The tensor again, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if self.size:
            tensor.view(-1).view(torch.uint8).numpy()[:] = row[self.start : self.start + self.size]
        return tensor.permute([self.order.index(axis) for axis in range(len(self.order))])


@dataclass(frozen=True, slots=True)
class _Masks:
    """Where masks of 0, 1 and 255 lie in the row: a bit per pixel, and a second one where any is 255."""

    start: int
    size: int
    has_ignored: bool
    shape: tuple[int, ...]

    def read(self, row: np.ndarray) -> torch.Tensor:
        """The masks again."""
        pixels, end = math.prod(self.shape), self.start + self.size
        array = np.unpackbits(row[self.start : end], count=pixels)
        if self.has_ignored:
            array[np.unpackbits(row[end : end + self.size], count=pixels) == 1] = _IGNORED_PIXEL
        return torch.from_numpy(array.reshape(self.shape))


class _Row:
    """The bytes of a batch on their way, before they have a place."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[tuple[int, np.ndarray]] = []

    def laid(self, value: Any) -> Any:
        """`value` with every tensor, in lists and dictionaries too, replaced by where it lies."""
        if isinstance(value, torch.Tensor):
            return self._laid_tensor(value)
        if isinstance(value, dict):
            return {key: self.laid(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.laid(one) for one in value]
        return value

    def laid_masks(self, masks: torch.Tensor) -> _Masks:
        """(Q, H, W) uint8 of 0, 1 and 255."""
        array = masks.numpy().reshape(-1)
        has_ignored = bool(array.size) and int(array.max()) == _IGNORED_PIXEL
        ones = np.packbits(array == 1 if has_ignored else array)
        parts = [ones, np.packbits(array == _IGNORED_PIXEL)] if has_ignored else [ones]
        return _Masks(self._place(*parts), ones.size, has_ignored, tuple(masks.shape))

    def write(self, memory: np.ndarray) -> None:
        """Put the row into `memory`, (at least `size`,) uint8."""
        for start, part in self._parts:
            memory[start : start + part.size] = part

    def _laid_tensor(self, tensor: torch.Tensor) -> _Tensor:
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
        lying = tensor.permute(order).contiguous()
        content = lying.reshape(-1).view(torch.uint8).numpy()
        return _Tensor(self._place(content), content.size, tensor.dtype, tuple(lying.shape), order)

    def _place(self, *parts: np.ndarray) -> int:
        """Where `parts` (bytes) will lie, one right behind the other."""
        start = -(-self.size // _ALIGNED) * _ALIGNED
        self.size = start
        for part in parts:
            self._parts.append((self.size, part))
            self.size += part.size
        return start


class SharedSlots:
    """Memory that a worker and the run share. To be made before the worker is forked; elsewhere it does not arrive."""

    _known: WeakValueDictionary[int, "SharedSlots"] = WeakValueDictionary()
    _numbers = count()
    _own: "SharedSlots | None" = None

    def __init__(self, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        self.number = next(self._numbers)
        self._memory = np.frombuffer(mmap.mmap(-1, slots * slot_bytes), dtype=np.uint8).reshape(slots, slot_bytes)
        self._used = [multiprocessing.get_context("fork").Lock() for _ in range(slots)]
        self._known[self.number] = self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _no_slots, ()

    def send_through(self) -> None:
        """Let every batch of this process go through these slots from now on."""
        SharedSlots._own = self

    def put(self, row: _Row) -> int | None:
        """The slot that holds `row` now; None where there is none, or the row is too large."""
        if row.size > self._memory.shape[1]:
            return None
        slot = next((number for number, used in enumerate(self._used) if used.acquire(block=False)), None)
        if slot is not None:
            row.write(self._memory[slot])
        return slot

    def take(self, slot: int, read: Callable[[np.ndarray], Any]) -> Any:
        """What `read` makes of the row in `slot`, which is free afterwards."""
        try:
            return read(self._memory[slot])
        finally:
            self._used[slot].release()


def _no_slots() -> None:
    return None


def make_slots(workers: int) -> list[SharedSlots]:
    """Slots for each of `workers`; none where processes are not forked or the memory is not to be had."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return []
    try:
        return [SharedSlots() for _ in range(workers)]
    except OSError:
        return []


def sent(fields: dict[str, Any], masks: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What `received` makes the same `fields` and `masks` of, in another process: once only, for a slot is free then.

    fields: tensors, in lists and dictionaries too, and what can be pickled. masks: (Q, H, W) uint8 of 0, 1 and 255.
    """
    row = _Row()
    layout = row.laid(fields), [row.laid_masks(one) for one in masks]
    own = SharedSlots._own
    slot = own.put(row) if own is not None else None
    if own is not None and slot is not None:
        return layout, own.number, slot
    memory = np.empty(row.size, dtype=np.uint8)
    row.write(memory)
    return layout, memory.tobytes(), 0


def received(layout: Any, place: int | bytes, slot: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Fields and masks again, in memory of their own."""

    def read(row: np.ndarray) -> tuple[dict[str, Any], list[torch.Tensor]]:
        fields, masks = layout
        return {name: _read(value, row) for name, value in fields.items()}, [one.read(row) for one in masks]

    if isinstance(place, bytes):
        return read(np.frombuffer(place, dtype=np.uint8))
    return SharedSlots._known[place].take(slot, read)


def _read(value: Any, row: np.ndarray) -> Any:
    if isinstance(value, _Tensor):
        return value.read(row)
    if isinstance(value, dict):
        return {key: _read(one, row) for key, one in value.items()}
    if isinstance(value, list):
        return [_read(one, row) for one in value]
    return value

"""How batches travel from a worker to the run: their tensors lie as bytes in one row, masks in a bit or two per pixel
of their windows.

The row lies in memory that a worker shares with the run, in one of a few slots that are used again and again; the
message between them then holds no more than the layout. Sent in messages, bytes are copied six times and more, with
new pages each time; with a shared file for every tensor, new pages alone take longer than making the batches. What
finds no slot goes as a message: where batches are too large for one, or workers were not forked.
"""

import math
import mmap
import multiprocessing
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from model.structures import IGNORE_LABEL
from utils.data.masks import Window, WindowedMasks

SLOTS = 3
"""Parcels of a worker on their way at most: two that DataLoader asks for ahead, and one that is being unpacked."""

SLOT_BYTES = 64 << 20
"""Address space of a slot; it takes memory for what parcels need of it only."""

_ALIGNED = 64


class Corner(NamedTuple):
    """A square of `side` pixels that is 0 but for its top left corner, `pixels` (h, w, 3) uint8."""

    pixels: np.ndarray
    side: int

    @property
    def size(self) -> int:
        """How many bytes the square takes."""
        return self.side * self.side * self.pixels.shape[2]

    def write(self, memory: np.ndarray) -> None:
        """Put the square into `memory`, (size,) uint8, row by row, channels last."""
        height, width, channels = self.pixels.shape
        square = memory.reshape(self.side, self.side, channels)
        square[:height, :width] = self.pixels
        square[height:], square[:height, width:] = 0, 0


class Squares(NamedTuple):
    """Squares of one size, at least one, which arrive as one tensor."""

    corners: list[Corner]

    def drawn(self) -> torch.Tensor:
        """(B, 3, side, side) uint8, channels last in memory."""
        first = self.corners[0]
        squares = np.empty((len(self.corners), first.size), dtype=np.uint8)
        for square, corner in zip(squares, self.corners, strict=True):
            corner.write(square)
        return torch.from_numpy(squares.reshape(-1, first.side, first.side, first.pixels.shape[2])).permute(0, 3, 1, 2)


class _Tensor(NamedTuple):
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


class _Window(NamedTuple):
    """Where the pixels of a mask's window lie in the row: a bit each, and a second one where any is 255."""

    start: int
    size: int
    has_ignored: bool
    top: int
    left: int
    shape: tuple[int, int]

    def read(self, row: np.ndarray) -> Window:
        """The window again."""
        pixels, end = math.prod(self.shape), self.start + self.size
        array = np.unpackbits(row[self.start : end], count=pixels)
        if self.has_ignored:
            array[np.unpackbits(row[end : end + self.size], count=pixels) == 1] = IGNORE_LABEL
        return Window(self.top, self.left, array.reshape(self.shape))


class _Masks(NamedTuple):
    """Where the windows of the masks of an image of `size` (height, width) lie in the row."""

    size: tuple[int, int]
    windows: list[_Window]

    def read(self, row: np.ndarray) -> torch.Tensor:
        """The masks, drawn."""
        return WindowedMasks(self.size, [window.read(row) for window in self.windows]).drawn()


class _Row:
    """The bytes of a batch on their way, before they have a place."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[tuple[int, np.ndarray | Corner]] = []

    def laid(self, value: Any) -> Any:
        """`value` with all tensors and masks, in lists and dictionaries too, replaced by where they lie."""
        if isinstance(value, torch.Tensor):
            return self._laid_tensor(value)
        if isinstance(value, Squares):
            return self._laid_squares(value.corners)
        if isinstance(value, WindowedMasks):
            return _Masks(value.size, [self._laid_window(window) for window in value.windows])
        if isinstance(value, dict):
            return {key: self.laid(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.laid(one) for one in value]
        return value

    def write(self, memory: np.ndarray) -> None:
        """Put the row into `memory`, (at least `size`,) uint8."""
        for start, part in self._parts:
            place = memory[start : start + part.size]
            if isinstance(part, Corner):
                part.write(place)
            else:
                place[:] = part

    def _laid_tensor(self, tensor: torch.Tensor) -> _Tensor:
        lying, order = _as_it_lies(tensor)
        content = lying.view(-1).view(torch.uint8).numpy()
        return _Tensor(self._place(content), content.size, tensor.dtype, tuple(lying.shape), order)

    def _laid_squares(self, corners: list[Corner]) -> _Tensor:
        side, channels = corners[0].side, corners[0].pixels.shape[2]
        shape = (len(corners), side, side, channels)
        return _Tensor(self._place(*corners), math.prod(shape), torch.uint8, shape, (0, 2, 3, 1))

    def _laid_window(self, window: Window) -> _Window:
        top, left, pixels = window
        has_ignored = bool(pixels.size) and int(pixels.max()) == IGNORE_LABEL
        ones = np.packbits(pixels == 1 if has_ignored else pixels)
        parts = [ones, np.packbits(pixels == IGNORE_LABEL)] if has_ignored else [ones]
        return _Window(self._place(*parts), ones.size, has_ignored, top, left, pixels.shape)

    def _place(self, *parts: np.ndarray | Corner) -> int:
        """Where `parts` (bytes) will lie, one right behind the other."""
        start = -(-self.size // _ALIGNED) * _ALIGNED
        self.size = start
        for part in parts:
            self._parts.append((self.size, part))
            self.size += part.size
        return start


def _as_it_lies(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A contiguous tensor with the axes in the order in which they lie in memory, and that order."""
    if tensor.is_contiguous():
        return tensor, tuple(range(tensor.dim()))
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    return tensor.permute(order).contiguous(), order


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


def sent(value: Any) -> tuple[Any, ...]:
    """What `received` makes the same of, in another process: once only, for a slot is free then.

    value: tensors, squares and masks, in lists and dictionaries too, and what can be pickled.
    """
    row = _Row()
    layout = row.laid(value)
    own = SharedSlots._own
    slot = own.put(row) if own is not None else None
    if own is not None and slot is not None:
        return layout, own.number, slot
    memory = np.empty(row.size, dtype=np.uint8)
    row.write(memory)
    return layout, memory.tobytes(), 0


def received(layout: Any, place: int | bytes, slot: int) -> Any:
    """The value again, in memory of its own, and the masks drawn: (Q, H, W) uint8 of 0, 1 and 255."""
    if isinstance(place, bytes):
        return _read(layout, np.frombuffer(place, dtype=np.uint8))
    return SharedSlots._known[place].take(slot, partial(_read, layout))


def _read(value: Any, row: np.ndarray) -> Any:
    if isinstance(value, _Tensor | _Masks):
        return value.read(row)
    if isinstance(value, dict):
        return {key: _read(one, row) for key, one in value.items()}
    if isinstance(value, list):
        return [_read(one, row) for one in value]
    return value

"""Reading RefCOCO's pickles without running what is in them."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from utils.data.errors import DataError


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` is needed for: Python 3 writes bytes into protocol 2 as text in latin1."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes spelled in {encoding!r}")
    return text.encode("latin1")


# How numpy itself rebuilds an array and a number; the names have moved between its versions.
_reconstruct_array: Callable[..., Any] = np.zeros(0).__reduce__()[0]  # type: ignore[assignment]
_make_scalar: Callable[..., Any] = np.float64(0).__reduce__()[0]  # type: ignore[assignment]
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(module, "_reconstruct"): _reconstruct_array for module in _ARRAY_MODULES},
    **{(module, "scalar"): _make_scalar for module in _ARRAY_MODULES},
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
    ("__builtin__", "long"): int,
}


class _AsksForCode(pickle.UnpicklingError):
    """A pickle names something that is not plain data; loading it elsewhere might run it."""


class _PlainUnpickler(pickle.Unpickler):
    """Admits containers, numbers, text and what numpy needs for its own; any other name in the pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise _AsksForCode(f"it asks for {module}.{name}")
        return admitted


def load_plain_pickle(content: bytes, path: str) -> Any:
    """Unpickle `content`, the bytes of `path`. Text written by Python 2 is read as UTF-8, or else as latin1.

    DataError when the bytes are no pickle, are cut short, or ask for anything but plain data.
    """
    try:
        try:
            return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
        except UnicodeDecodeError:
            return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise DataError(
            f"{path} is not a pickle of plain data ({error}); expected lists, objects, numbers and text only: fetch "
            f"it again",
            cause="pickle with code" if isinstance(error, _AsksForCode) else "broken pickle",
        ) from error


def unpickle_plain(content: bytes) -> Any:
    """Unpickle what this program wrote: plain data. pickle.UnpicklingError when the bytes are anything else."""
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise pickle.UnpicklingError(str(error)) from error

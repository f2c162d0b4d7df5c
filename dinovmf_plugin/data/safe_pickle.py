"""Reads pickled plain data and NumPy arrays without running anything that the pickle names.

``gnd_roxford5k.pkl`` and ``gnd_rparis6k.pkl`` are published as pickles, and ``pickle.load`` runs
whatever a pickle asks for. Here the only globals that resolve are the few that NumPy writes for an
array, and they resolve to the small stand-ins below, never to NumPy's or Python's own functions.
"""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["load_plain_pickle"]

_NUMBERS = "biuf"
_TEXT = "SU"


class _Type:
    """Stands for ``numpy.ndarray``, which array pickles name but need not get."""


class _DType:
    """A number or text type; only its byte order may be set afterwards."""

    def __init__(self, spec: Any, *_: Any) -> None:
        if not isinstance(spec, str):
            raise pickle.UnpicklingError(f"array type {spec!r} is not a plain number type")
        try:
            self.dtype = np.dtype(spec)
        except TypeError as error:
            raise pickle.UnpicklingError(f"array type {spec!r} is unknown") from error
        if self.dtype.kind not in _NUMBERS + _TEXT:
            raise pickle.UnpicklingError(f"array type {spec!r} is not a plain number type")

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"array type has an unknown byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


def _decode(dtype: Any, shape: Any, data: Any, order: str) -> NDArray[Any]:
    if isinstance(data, str):  # bytes of a Python 2 pickle
        data = data.encode("latin1")
    plain = (
        isinstance(dtype, _DType)
        and isinstance(shape, tuple)
        and all(isinstance(size, int) and size >= 0 for size in shape)
        and isinstance(data, bytes | bytearray)
    )
    if not plain:
        raise pickle.UnpicklingError("array is not a plain block of numbers")
    try:
        return np.frombuffer(data, dtype=dtype.dtype).reshape(shape, order=order).copy()  # type: ignore[call-overload]
    except ValueError as error:
        raise pickle.UnpicklingError(f"array of shape {shape} is damaged: {error}") from error


class _Array:
    """An array of pickle protocols 0 to 4: made empty, filled by its state."""

    def __init__(self, *_: Any) -> None:
        self.value: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("array state is not the one that NumPy writes")
        _, shape, dtype, fortran, data = state
        self.value = _decode(dtype, shape, data, "F" if fortran else "C")


class _BufferArray(_Array):
    """An array of pickle protocol 5."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        if order not in ("C", "F"):
            raise pickle.UnpicklingError(f"array has an unknown memory order {order!r}")
        self.value = _decode(dtype, shape, data, order)


class _Scalar(_Array):
    """A NumPy number."""

    def __init__(self, dtype: Any, data: Any = b"") -> None:
        self.value = _decode(dtype, (), data, "C")


class _Bytes:
    """``_codecs.encode``, by which protocol 2 writes bytes under Python 3; latin-1 only."""

    def __new__(cls, text: Any, encoding: Any = None) -> Any:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError(f"refused to encode with {encoding!r}")
        return text.encode("latin1")


class _NoBytes:
    """``bytes()``, by which protocols 0 to 2 write empty bytes; takes no arguments."""

    def __new__(cls) -> Any:
        return b""


_GLOBALS: dict[tuple[str, str], type] = {
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _NoBytes,
    ("numpy", "ndarray"): _Type,
    ("numpy", "dtype"): _DType,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", _BufferArray),
        )
    },
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            stand_in = _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None
        # A fresh subclass each time: a pickle may set attributes on what it is given.
        return type(stand_in.__name__, (stand_in,), {})


def _plain(value: Any, done: dict[int, Any], depth: int = 0) -> Any:
    """Arrays for their stand-ins, inside dicts, lists and tuples; each object once."""
    if isinstance(value, _Array):
        return value.value[()] if isinstance(value, _Scalar) else value.value
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if id(value) in done:
        return done[id(value)]
    if depth > 16:
        raise pickle.UnpicklingError("it nests more than 16 levels deep")
    plain: Any
    if isinstance(value, dict):
        plain = {key: _plain(item, done, depth + 1) for key, item in value.items()}
    elif isinstance(value, list):
        plain = [_plain(item, done, depth + 1) for item in value]
    elif isinstance(value, tuple):
        plain = tuple(_plain(item, done, depth + 1) for item in value)
    else:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__.lstrip('_')}")
    done[id(value)] = plain
    return plain


def load_plain_pickle(path: str | Path) -> Any:
    """Load a pickle of dicts, lists, tuples, numbers, text and NumPy arrays of these.

    Pickles of Python 2 and 3, protocols 0 to 5, and of NumPy 1 and 2 are read; a file that ends in ``.gz``
    is unpacked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a pickle or holds anything else; nothing that it names is run.
    """
    opened = gzip.open if Path(path).suffix == ".gz" else open
    with opened(path, "rb") as file:
        try:
            return _plain(_PlainUnpickler(file, encoding="latin1").load(), {})
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(
                f"{path} was refused: {error}; only plain lists, dicts, numbers, text and NumPy "
                "arrays are read from a pickle, since others can run code"
            ) from error

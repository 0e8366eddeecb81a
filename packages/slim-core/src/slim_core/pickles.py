"""Arrays from untrusted ``.npy`` and ``torch.save`` files: data is read, no code ever runs.

Numpy stores a dictionary as a pickled 0-d object array, which :func:`numpy.load` reads only by
trusting the file.  The functions here admit dictionaries, lists, tuples, numbers, text, numpy
arrays and torch tensors (as numpy arrays), and refuse everything else by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from slim_core.errors import CheckpointError, FileSecurityError
from slim_core.files import PathLike, check_input_file
from slim_core.torch_pickles import (
    TORCH_GLOBALS,
    LazyTensor,
    load_from_bytes,
    read_torch_file,
)
from slim_core.unpickler import Globals, Opaque, restricted_load

_PLAIN = (str, bytes, int, float, bool, type(None))
_DTYPE_NAME = "biufcSU"
_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4")


def load_npy(path: PathLike, *, max_bytes: int | None = None) -> np.ndarray:
    """Load a plain ``.npy`` array, which needs no pickle.

    Raises
    ------
    FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    CheckpointError
        Not a ``.npy`` file, damaged, or an array of Python objects.
    """
    file = check_input_file(path, max_bytes=max_bytes)
    with file.open("rb") as stream:
        if _read_header(file, stream)[1].hasobject:
            raise CheckpointError(
                f"{file} holds Python objects, not numbers", hint="load it with load_npy_dict"
            )
        stream.seek(0)
        try:
            return np.lib.format.read_array(stream, allow_pickle=False)
        except (ValueError, EOFError, MemoryError) as error:
            raise CheckpointError(f"{file} is damaged or cut short: {error}") from error


def load_npy_dict(path: PathLike, *, max_bytes: int | None = None) -> dict[str, Any]:
    """Load a dictionary stored by ``np.save``, for example name -> array.

    Parameters
    ----------
    path : path
    max_bytes : int, optional
        Largest file that is accepted.

    Returns
    -------
    dict
        In the order of the file.  Torch tensors become numpy arrays of their own memory
        (bfloat16 as ``ml_dtypes.bfloat16``).

    Raises
    ------
    FileSecurityError
        The pickle uses a global that is not data (the message names it; nothing has been run), or
        as :func:`slim_core.files.check_input_file`.
    CheckpointError
        Not a ``.npy`` file, damaged, not a dictionary, or with keys that are not str.
    """
    file = check_input_file(path, max_bytes=max_bytes)
    with file.open("rb") as stream:
        shape, dtype = _read_header(file, stream)
        if shape != () or dtype != np.dtype(object):
            raise CheckpointError(
                f"{file} holds an array of {dtype} with shape {shape}, not a dictionary",
                hint="load it with load_npy",
            )
        array = restricted_load(stream, _NPY_GLOBALS, source=str(file), refuse=FileSecurityError)
    if not isinstance(array, _Array) or not isinstance(array.objects, list):
        raise CheckpointError(f"{file} is damaged: no object array")
    if len(array.objects) != 1:
        raise CheckpointError(f"{file} is damaged: {len(array.objects)} objects in place of one")
    return _string_dict(file, array.objects[0])


def load_torch_file(path: PathLike, *, max_bytes: int | None = None) -> dict[str, Any]:
    """Load a dictionary stored by ``torch.save``, with numpy arrays for the tensors, without torch.

    Raises
    ------
    FileSecurityError
        As :func:`load_npy_dict`.
    CheckpointError
        Not a file of ``torch.save``, damaged, not a dictionary, or with keys that are not str.
    """
    file = check_input_file(path, max_bytes=max_bytes)
    return _string_dict(file, read_torch_file(file, FileSecurityError))


class _Array:
    """An array being unpickled; numpy itself sees only what has been checked."""

    __slots__ = ("objects", "value")

    def __init__(self) -> None:
        self.value: np.ndarray | None = None
        self.objects: Any = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if dtype.is_object:
            self.objects = data
        else:
            self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C")


class _Dtype:
    """A dtype being unpickled: a simple number or text type and its byte order."""

    __slots__ = ("_dtype", "is_object")

    def __init__(self, kind: Any, *_flags: Any) -> None:
        self.is_object = kind in ("O", "O8", "|O")
        if isinstance(kind, Opaque) and isinstance(kind.value, np.dtype):
            self._dtype = kind.value
        elif isinstance(kind, str) and not self.is_object:
            self._dtype = np.dtype(kind)
            if self._dtype.kind not in _DTYPE_NAME or self._dtype.fields is not None:
                raise ValueError(f"arrays of {kind:.20} are not supported")
        elif not self.is_object:
            raise ValueError("an array of an unknown type")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if self.is_object:
            return
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError(f"arrays of {self._dtype} with fields are not supported")
        if order != "|":
            self._dtype = self._dtype.newbyteorder(order)

    @property
    def dtype(self) -> np.dtype:
        """The finished dtype."""
        if self.is_object:
            raise ValueError("nested arrays of Python objects are not supported")
        return self._dtype


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_axes: Any) -> np.ndarray:
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
        raise TypeError("an array without bytes")
    array: np.ndarray = np.frombuffer(data, dtype.dtype).reshape(shape, order=order).copy("C")
    return array


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_axes: Any) -> _Array:
    array = _Array()
    array.value = _from_buffer(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_buffer(data, dtype, (), "C")[()]


def _npy_globals() -> Globals:
    functions: dict[str, Callable[..., Any]] = {
        "multiarray._reconstruct": lambda *_args: _Array(),
        "multiarray.scalar": _scalar,
        "numeric._frombuffer": _frombuffer,
    }
    table: dict[tuple[str, str], Any] = dict(TORCH_GLOBALS)
    for name, function in functions.items():
        module, _, attribute = name.partition(".")
        for core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
            table[f"{core}.{module}", attribute] = Opaque(function=function)
    table["numpy", "dtype"] = Opaque(function=_Dtype)
    table["numpy", "ndarray"] = Opaque()
    for name in _ML_DTYPES:
        table["ml_dtypes", name] = Opaque(value=np.dtype(getattr(ml_dtypes, name)))
    table["torch.storage", "_load_from_bytes"] = Opaque(
        function=functools.partial(load_from_bytes, refuse=FileSecurityError)
    )
    return table


_NPY_GLOBALS = _npy_globals()


def _read_header(file: Path, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
    except (ValueError, EOFError) as error:
        raise CheckpointError(f"{file} is not a .npy file: {error}") from error
    return shape, dtype


def _string_dict(file: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, not a dictionary")
    for key in value:
        if not isinstance(key, str):
            raise CheckpointError(f"{file}: the key {key!r:.80} is not text")
    try:
        return {key: _plain(item) for key, item in value.items()}
    except (RecursionError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} holds something that is no data: {error}") from error


def _plain(value: Any) -> Any:
    """Replace what stands for arrays by arrays, at any depth."""
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("a nested array of Python objects")
        return value.value
    if isinstance(value, LazyTensor):
        return value.load()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, (*_PLAIN, np.generic)):
        return value
    raise ValueError(f"a {type(value).__name__}")

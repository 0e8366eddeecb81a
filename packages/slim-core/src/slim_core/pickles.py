"""Arrays from untrusted ``.npy`` and ``torch.save`` files: data is read, no code ever runs.

Numpy stores a dictionary as a pickled 0-d object array, which :func:`numpy.load` reads only by
trusting the file.  The functions here admit dictionaries, lists, tuples, numbers, text, numpy
arrays and torch tensors (as numpy arrays), and refuse everything else by name.
"""

from __future__ import annotations

import functools
import re
import tokenize
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

_BAD_HEADER = (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError)
_MAX_DEPTH = 100
_PLAIN = (str, bytes, int, float, bool, type(None))
_DTYPE_NAME = re.compile(r"[<>|=]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d{1,9})")
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
            if not _DTYPE_NAME.fullmatch(kind):
                raise ValueError(f"arrays of {kind:.20} are not supported")
            self._dtype = np.dtype(kind)
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
    except _BAD_HEADER as error:
        raise CheckpointError(f"{file} is not a .npy file: {error}") from error
    return shape, dtype


def _string_dict(file: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, not a dictionary")
    for key in value:
        if not isinstance(key, str):
            raise CheckpointError(f"{file}: the key {key!r:.80} is not text")
    try:
        plain: dict[str, Any] = _Plain().convert(value)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} holds something that is no data: {error}") from error
    return plain


class _Plain:
    """Replaces what stands for arrays by arrays, at any depth."""

    def __init__(self) -> None:
        # By identity: a few nested lists can refer to one another very many times.
        self._done: dict[int, Any] = {}

    def convert(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, (*_PLAIN, np.generic)):
            return value
        if id(value) not in self._done:
            if depth > _MAX_DEPTH:
                raise ValueError("nested too deep, or containing itself")
            self._done[id(value)] = self._convert(value, depth + 1)
        return self._done[id(value)]

    def _convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, _Array) and value.value is not None:
            return value.value
        if isinstance(value, LazyTensor):
            return value.load()
        if isinstance(value, dict):
            return {self.convert(k, depth): self.convert(v, depth) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.convert(item, depth) for item in value)
        what = "nested array of Python objects" if isinstance(value, _Array) else type(value)
        raise ValueError(f"a {what}")

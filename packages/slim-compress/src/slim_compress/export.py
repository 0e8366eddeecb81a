"""Writing results as one raw file for each array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slim_compress.arrays import fit, to_numpy
from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.files import MODE_WEIGHTS, PathLike, as_path, atomic_write, make_dir
from slim_core.validate import check_type

DTYPES = (np.dtype(np.int8), np.dtype(np.int64))
_MAX_FILE_NAME = 255


def export_arrays(arrays: Mapping[str, Any], path: PathLike, dtype: Any = np.int8) -> None:
    """Write ``<path>/<key>.dat`` for each array: raw, C order, mode 0400.

    Parameters
    ----------
    arrays : dict of str to numpy.ndarray
    path : str
        Created with mode 0750 if missing.
    dtype : np.int8 or np.int64
        Of the files.

    Raises
    ------
    InvalidTypeError
        ``arrays`` is no dict or ``path`` no str, or a key is no str.
    InvalidValueError
        Another dtype, a key that cannot be a file name, or a value that ``dtype`` cannot hold
        (info arrays need ``dtype=np.int64``).  Nothing has been written then.
    """
    check_type("arr", arrays, dict)
    check_type("path", path, str)
    target = _check_dtype(dtype)
    ready = {
        _file_name(key): fit(key, to_numpy(key, value), target) for key, value in arrays.items()
    }
    directory = make_dir(as_path("path", path))
    for name, array in ready.items():
        with atomic_write(directory / name, MODE_WEIGHTS) as stream:
            stream.write(np.ascontiguousarray(array).data)


def _check_dtype(dtype: Any) -> np.dtype:
    for allowed in DTYPES:
        if dtype is allowed.type or (isinstance(dtype, np.dtype) and dtype == allowed):
            return allowed
    raise InvalidValueError(f"dtype must be np.int8 or np.int64, not {dtype!r:.80}")


def _file_name(key: Any) -> str:
    if not isinstance(key, str):
        raise InvalidTypeError(f"the keys of arr must be str, not {type(key).__name__}")
    name = f"{key}.dat"
    if "/" in key or "\0" in key or not key or len(name.encode()) > _MAX_FILE_NAME:
        raise InvalidValueError(f"{key!r:.80} cannot be the name of a file")
    return name

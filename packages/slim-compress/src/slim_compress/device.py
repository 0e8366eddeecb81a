"""Hand-off to the program of a CANN user that makes the stream of the hardware.

The program is called as ``executor k1 n1 1 1 1 0 0 INPUT WEIGHT INDEX INFO``: fractals along k and
n, tight packing, two reserved ones, low-sparsity code set, no tiling, and four files.  INPUT is the
weight in FRACTAL_NZ (int8); the program writes WEIGHT (int8), INDEX (int8, 8 bytes a tile of
8 x 8 fractals) and INFO (three uint32: tiling_n, tiling_k, bytes of WEIGHT).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from slim_compress.codec import Compressed
from slim_compress.errors import ExecutorError
from slim_compress.layout import nd_to_nz
from slim_core.errors import FormatError
from slim_core.files import MODE_PRIVATE, make_dir

MAX_FRACTALS = 50_000  # along n and along k: what the program supports
_TILE = 8
_TAIL = 2000


def compress_for_device(
    matrix: np.ndarray, *, executor: Path, root: Path, timeout: float, name: str
) -> Compressed:
    """Compress a matrix with the user's program.

    Parameters
    ----------
    matrix : numpy.ndarray
        int8, (n, k).
    executor : Path
    root : Path
        Existing directory for temporary files, which are always removed.
    timeout : float
        Seconds until the program is killed.
    name : str
        Of the tensor, for messages.

    Returns
    -------
    Compressed
        ``info`` has five numbers: tiling_k, tiling_n, k, n, 1.

    Raises
    ------
    FormatError
        The matrix has more than 50000 fractals along a side.
    ExecutorError
        The program fails, does not end in time, or writes files that do not fit together; carries
        what it printed.
    """
    nz = nd_to_nz(matrix, name=name)
    k1, n1 = nz.shape[:2]
    if max(k1, n1) > MAX_FRACTALS:
        raise FormatError(
            f"{name} has {n1} x {k1} fractals; the device codec takes {MAX_FRACTALS} along a side"
        )
    with _scratch_dir(root) as scratch:
        files = [
            scratch / name
            for name in (
                "input_weight_path.bin",
                "compress_output.bin",
                "compress_index.bin",
                "compress_info.bin",
            )
        ]
        _write_private(files[0], nz)
        numbers = [k1, n1, 1, 1, 1, 0, 0]
        _run([str(executor), *map(str, numbers), *map(str, files)], timeout, name)
        return _read_results(files[1:], matrix.shape, name)


def index_bytes(n: int, k: int) -> int:
    """Return the length of the device index of an (n, k) weight."""
    n1, k1 = -(-n // 16), -(-k // 32)
    return 8 * -(-n1 // _TILE) * -(-k1 // _TILE)


@contextmanager
def _scratch_dir(root: Path) -> Iterator[Path]:
    base = root / f"{os.getpid()}_{secrets.token_hex(4)}"
    try:
        make_dir(base)
        yield make_dir(base / ".tmp")
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _write_private(path: Path, array: np.ndarray) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE_PRIVATE)
    with os.fdopen(descriptor, "wb") as stream:
        array.tofile(stream)


def _run(command: list[str], timeout: float, name: str) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExecutorError(
            f"{name}: {command[0]} did not end within {timeout:g} s and was killed"
        ) from None
    except OSError as error:
        raise ExecutorError(f"{name}: {command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise ExecutorError(
            f"{name}: {command[0]} failed with exit status {done.returncode}\n"
            f"stdout: {done.stdout[-_TAIL:]}\nstderr: {done.stderr[-_TAIL:]}"
        )


def _read_results(files: list[Path], shape: tuple[int, ...], name: str) -> Compressed:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ExecutorError(f"{name}: the executor ended well but wrote no {', '.join(missing)}")
    weight, index = (np.fromfile(file, np.int8) for file in files[:2])
    numbers = np.fromfile(files[2], np.uint32)
    if numbers.size < 3:
        raise ExecutorError(f"{name}: the executor wrote {numbers.size} info values, not 3")
    tiling_n, tiling_k, length = (int(number) for number in numbers[:3])
    n, k = shape
    if weight.size != length or index.size != index_bytes(n, k):
        raise ExecutorError(
            f"{name}: the executor wrote {weight.size} weight and {index.size} index bytes; "
            f"{length} and {index_bytes(n, k)} are expected"
        )
    return Compressed(weight, index, np.array([tiling_k, tiling_n, k, n, 1], np.int64))

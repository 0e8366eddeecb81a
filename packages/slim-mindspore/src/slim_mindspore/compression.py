"""From a sparse-quantized checkpoint to what a weight compressor takes, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slim_core.errors import FormatError, InvalidValueError, PatternError
from slim_core.files import MODE_SHARED, PathLike, as_path, atomic_write
from slim_core.validate import did_you_mean
from slim_mindspore.ckpt import CkptFile, write_ckpt
from slim_mindspore.tensors import write_tensors

NAME_PATTERN = (
    r"^(?=.{1,100}$)model\.layers\.\d+\.(attention[^_]|feed_forward|augs_attn\d+).*\.weight$"
)
PARTS = ("weight", "index", "info")


@dataclass(frozen=True)
class WeightSummary:
    """Shape of a weight, its number of elements, and the share of them that are zero."""

    shape: tuple[int, ...]
    size: int
    zeros: float


def quantized_weights(
    source: PathLike, disable_names: Sequence[str] = (), pattern: str = NAME_PATTERN
) -> dict[str, np.ndarray]:
    """Return the integer weights of a checkpoint, int8, by the names of their tensors.

    Parameters
    ----------
    source : path
        A ``.ckpt`` file of :class:`slim_mindspore.Calibrator`.
    disable_names : sequence of str
        Cells to leave out, without ``.weight``.
    pattern : str
        What names must match; at most 100 characters, since compressors make file names of them.

    Raises
    ------
    PatternError
        A name in ``disable_names`` is no cell of the checkpoint, or nothing is left.
    FormatError
        A weight is no matrix of int8 codes.
    """
    file = CkptFile(source)
    cells = [name.removesuffix(".weight") for name in file.tensors if name.endswith(".weight")]
    for name in disable_names:
        if name not in cells:
            raise PatternError(
                f"disable_names: {file.path} has no cell {name!r}", hint=did_you_mean(name, cells)
            )
    search = re.compile(pattern).search
    weights = {}
    for cell in cells:
        key = f"{cell}.weight"
        # A cell that was left in floating point has no scale beside its weight.
        quantized = f"{cell}.deq_scale" in file.tensors
        if not quantized or cell in disable_names or not search(key):
            continue
        weights[key] = _codes(key, file.load(key))
    if not weights:
        raise PatternError(f"{file.path} holds no quantized weight that is to be compressed")
    return weights


def prepare_for_compressor(
    source: PathLike,
    target: PathLike,
    disable_names: Sequence[str] = (),
    pattern: str = NAME_PATTERN,
) -> dict[str, WeightSummary]:
    """Write the integer weights of a checkpoint to a file of their own.

    Parameters
    ----------
    source, disable_names, pattern
        As in :func:`quantized_weights`.
    target : path
        ``.npz`` and ``.safetensors`` hold plain arrays; ``.npy`` is the pickled dictionary that
        compressors of old load, and ask for trust before they do.

    Returns
    -------
    dict of str to WeightSummary

    Raises
    ------
    InvalidValueError
        The target has another suffix.
    PatternError, FormatError
        As :func:`quantized_weights`.
    """
    file = as_path("target", target)
    if file.suffix not in (".npz", ".safetensors", ".npy"):
        raise InvalidValueError(f"target must end in .npz, .safetensors or .npy, not {file.name!r}")
    weights = quantized_weights(source, disable_names, pattern)
    if file.suffix == ".safetensors":
        write_tensors(file, weights)
    else:
        with atomic_write(file, MODE_SHARED) as stream:
            if file.suffix == ".npz":
                np.savez(stream, **weights)  # type: ignore[arg-type]
            else:
                np.save(stream, np.asarray(weights, dtype=object), allow_pickle=True)
    return {
        name: WeightSummary(weight.shape, weight.size, float(np.mean(weight == 0)))
        for name, weight in weights.items()
    }


def merge_compressed(
    source: PathLike,
    target: PathLike,
    weight: Mapping[str, np.ndarray],
    index: Mapping[str, np.ndarray],
    info: Mapping[str, np.ndarray],
) -> Path:
    """Put compressed weights into a copy of the checkpoint.

    For every cell ``P`` that was compressed, ``P.weight`` becomes the compressed stream, and
    ``P.index`` and ``P.info`` join it.

    Parameters
    ----------
    source : path
        The sparse-quantized ``.ckpt`` file.
    target : path
        The ``.ckpt`` file to write.
    weight, index, info : mapping of str to numpy.ndarray
        What the compressor returned, by the names of the weights.

    Raises
    ------
    FormatError
        The three do not have the same names, or one is not in the checkpoint.
    """
    if weight.keys() != index.keys() or weight.keys() != info.keys():
        raise FormatError("weight, index and info must have the same names")
    file = CkptFile(source)
    for name in weight:
        if name not in file.tensors or not name.endswith(".weight"):
            raise FormatError(f"{file.path} has no weight {name!r}")
    tensors: dict[str, np.ndarray] = {}
    for name in file.tensors:
        if name not in weight:
            tensors[name] = file.load(name)
            continue
        cell = name.removesuffix(".weight")
        for part, source_of in zip(PARTS, (weight, index, info), strict=True):
            tensors[f"{cell}.{part}"] = np.asarray(source_of[name])
    path = as_path("target", target)
    write_ckpt(path, tensors)
    return path


def _codes(name: str, weight: np.ndarray) -> np.ndarray:
    codes = weight.astype(np.int8)
    if weight.ndim != 2 or not np.array_equal(codes, weight):
        raise FormatError(f"{name} is no matrix of int8 codes")
    return codes

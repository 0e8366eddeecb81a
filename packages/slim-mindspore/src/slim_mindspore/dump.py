"""What calibration saw and chose, for a look at single cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slim_core.files import MODE_SHARED, PathLike, as_path, atomic_write, make_dir
from slim_mindspore.quantize import QuantizedNetwork


def dump_arrays(quantized: QuantizedNetwork, directory: PathLike) -> Path:
    """Write one ``<cell>.npz`` for each quantized cell.

    They hold, float32, ``weight_scale`` and ``weight_offset`` (out, 1) or (out, groups); where
    there are such, ``smooth_scale`` (in,), ``input_scale`` and ``input_offset`` (1,); and of the
    inputs seen in calibration ``input_low``, ``input_high`` and ``input_mean``, the mean of
    magnitudes, (in,).

    Parameters
    ----------
    quantized : QuantizedNetwork
    directory : path
        Created with mode 0750 if it is not there; files of the same names are replaced.
    """
    folder = as_path("directory", directory)
    make_dir(folder)
    for name, result in quantized.layers.items():
        layer, seen = result.layer, quantized.inputs.get(name)
        found = {
            "weight_scale": layer.weight_scale,
            "weight_offset": layer.weight_offset,
            "smooth_scale": result.smooth,
            "input_scale": layer.input_scale,
            "input_offset": layer.input_offset,
            "input_low": None if seen is None else seen.low,
            "input_high": None if seen is None else seen.high,
            "input_mean": None if seen is None else seen.mean,
        }
        arrays = {key: np.asarray(array) for key, array in found.items() if array is not None}
        with atomic_write(folder / f"{name}.npz", MODE_SHARED) as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
    return folder

"""The ``npy`` layout: one pickled dictionary per kind of parameter, keyed by layer name.

Read back with ``numpy.load(file, allow_pickle=True).item()``, or without trusting the file with
:func:`slim_core.pickles.load_npy_dict`.  A dictionary is one object, so the whole model is held in
memory until it is written; use a safetensors format for models larger than the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slim_core.files import MODE_WEIGHTS, atomic_write
from slim_core.formats.base import Tensors

# local tensor name -> file; float biases get a file of their own, so that they never take the
# place of the weight that has the same key
_FILES = {
    "weight": "quant_weight",
    "weight_scale": "weight_scale",
    "weight_offset": "weight_offset",
    "input_scale": "input_scale",
    "input_offset": "input_offset",
    "quant_bias": "quant_bias",
    "deq_scale": "deq_scale",
    "weight_absmax": "weight_absmax",
    "weight_shape": "weight_shape",
    "left_trans": "left_trans",
    "right_trans": "right_trans",
    "clip_ratio": "clip_ratio",
    "bias": "fp_bias",
}
_HEADS = (".fa_q", ".fa_k", ".fa_v")


class NpyWriter:
    """Collects the tensors of a model and writes the dictionaries on :meth:`close`.

    Parameters
    ----------
    directory : Path
        Must exist.
    convert : callable, optional
        Applied to each array before it enters its dictionary, for example ``torch.from_numpy``.
    """

    def __init__(self, directory: Path, convert: Callable[[np.ndarray], Any] | None = None) -> None:
        self._directory = directory
        self._convert = convert or (lambda array: array)
        self._files: dict[str, dict[str, Any]] = {}

    def add(self, layer: str, tensors: Tensors) -> None:
        """Take the tensors of a layer by their local names."""
        for local, array in tensors.items():
            if layer.endswith("norm") and local in ("weight", "bias"):
                self._put("anti_fp_norm", f"{layer}.{local}", array)
            elif local.startswith("kv_cache_"):
                self._put(local, f"{layer}.{local}", array)
            elif layer.endswith(_HEADS):
                self._put(f"fa_quant_{local}", f"{layer}.{local}", array)
            elif local in _FILES:
                self._put(_FILES[local], layer, array)
            else:
                self._put("quant_weight", f"{layer}.{local}", array)

    def close(self) -> list[Path]:
        """Write every dictionary that is not empty, mode 0400, and return the files."""
        written = []
        for stem, content in self._files.items():
            path = self._directory / f"{stem}.npy"
            with atomic_write(path, MODE_WEIGHTS) as stream:
                np.save(stream, np.array(content, dtype=object), allow_pickle=True)
            written.append(path)
        return written

    def _put(self, stem: str, key: str, array: np.ndarray) -> None:
        self._files.setdefault(stem, {})[key] = self._convert(array)

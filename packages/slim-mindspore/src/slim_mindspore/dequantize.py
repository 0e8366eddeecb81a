"""Back from integers to a float model."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from slim_core.errors import InvalidValueError, StructureError
from slim_core.files import PathLike, as_path
from slim_core.validate import check_choice
from slim_mindspore.load import QuantizedTensors, read_quantized
from slim_mindspore.names import to_hugging_face
from slim_mindspore.tensors import WEIGHT_SUFFIXES, write_tensors

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def dequantized_tensors(content: QuantizedTensors) -> dict[str, np.ndarray]:
    """Return float tensors, by MindFormers names, of a quantized checkpoint.

    A bias that was part of an integer bias comes back to within half a step of it; it is left out
    where it is zero to within that.

    Raises
    ------
    StructureError
        The checkpoint quantizes the cache only, so its tensors are float already.
    """
    if not content.layers:
        raise StructureError("no layer of the checkpoint is quantized")
    tensors = dict(content.floats)
    for name, result in content.layers.items():
        tensors[f"{name}.weight"] = result.dequantized().astype(np.float32)
        layer = result.layer
        if layer.bias is None:
            continue
        bias = np.asarray(layer.bias, np.float32)
        step = 0.0
        if layer.scheme.is_static:
            step = np.asarray(layer.input_scale) * np.asarray(layer.weight_scale).reshape(-1)
        if (np.abs(bias) > 0.501 * step).any():
            tensors[f"{name}.bias"] = bias
    return tensors


def dequantize_file(
    source: PathLike, target: PathLike, *, dtype: str = "float32", names: str = "mindformers"
) -> None:
    """Write the float model that a quantized checkpoint stands for; needs no MindSpore.

    Parameters
    ----------
    source : path
        As for :func:`slim_mindspore.load.read_quantized`.
    target : path
        Ends in ``.ckpt`` or ``.safetensors``.
    dtype : str
        ``float32``, ``float16`` or ``bfloat16``.
    names : str
        ``mindformers`` or ``hugging_face``.

    Raises
    ------
    InvalidValueError
        The target has another suffix, or an option is unknown.
    CheckpointError, FormatError, StructureError
        The source is damaged or not quantized.
    """
    file = as_path("target", target)
    if file.suffix not in WEIGHT_SUFFIXES:
        raise InvalidValueError(f"target must end in .ckpt or .safetensors, not {file.name!r}")
    kind = DTYPES[check_choice("dtype", dtype, DTYPES)]
    check_choice("names", names, ("mindformers", "hugging_face"))
    tensors = dequantized_tensors(read_quantized(source))
    rename = to_hugging_face if names == "hugging_face" else str
    write_tensors(file, {rename(name): array.astype(kind) for name, array in tensors.items()})

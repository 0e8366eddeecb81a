"""What the formats of other tools have in common: integers, described in ``config.json``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from slim_core.dtypes import IntType
from slim_core.errors import FormatError
from slim_core.formats.base import Format, to_numpy
from slim_core.layers import QuantizedLinear
from slim_core.scheme import Granularity, QuantScheme, ScaleKind, Variant


class ForeignFormat(Format):
    """A layout that transformers reads with the code of another project."""

    @abstractmethod
    def config(self, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return ``quantization_config`` of ``config.json``.

        Parameters
        ----------
        layers : mapping
            Scheme of every linear layer of the blocks by its name, float ones included.
        """

    def config_changes(self, model_type: str, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return the quantization configuration, the only description of such a checkpoint."""
        return {"quantization_config": self.config(layers)}

    def weight_file(self, model_type: str) -> str:
        """Return the name that Hugging Face libraries look for."""
        return "model"


def integer_bits(scheme: QuantScheme) -> int | None:
    """Return the bits of plain integer weights with a float scale, None for all else."""
    weight = scheme.weight
    if weight is None or not isinstance(weight.dtype, IntType):
        return None
    plain = weight.scales is ScaleKind.FLOAT and scheme.variant is Variant.NONE
    return weight.dtype.bits if plain and not _per_tensor(scheme) else None


def group_problem(scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
    """Return why the groups of a weight of this shape are not whole, None if they are."""
    if scheme.group_size and shape[1] % scheme.group_size:
        return f"group size {scheme.group_size} does not divide its {shape[1]} input channels"
    return None


def unsigned_parts(layer: QuantizedLinear, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes and zero points from 0 on, and float32 scales, of a weight-only layer.

    Returns
    -------
    codes : uint8, shape (out, in)
    zeros : uint8, shape (out, groups)
    scales : float32, shape (out, groups)
    """
    half = 1 << (bits - 1)
    codes = to_numpy(layer.codes, np.int16) + half
    offset = to_numpy(layer.weight_offset, np.float32)
    if (offset != np.rint(offset)).any():
        raise FormatError(
            f"{layer.name} has fractional zero points, and this format holds integers",
            hint="method hqq makes them if float_offset is set",
        )
    zeros = offset.astype(np.int16) + half
    if zeros.min() < 0 or zeros.max() >= 2 * half:
        raise FormatError(f"{layer.name} has zero points that {bits} bits do not hold")
    return codes.astype(np.uint8), zeros.astype(np.uint8), to_numpy(layer.weight_scale, np.float32)


def signed_layer(
    name: str,
    scheme: QuantScheme,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    bias: np.ndarray | None,
    model_dtype: str,
) -> QuantizedLinear:
    """Return the layer of :func:`unsigned_parts`."""
    codes, zeros, scales = parts
    half = 1 << (scheme.weight.dtype.bits - 1) if scheme.weight is not None else 0
    return QuantizedLinear(
        name,
        scheme,
        (codes.astype(np.int16) - half).astype(np.int8),
        scales.astype(np.float32),
        zeros.astype(np.float32) - half,
        bias=bias,
        model_dtype=model_dtype,
    )


def take(name: str, tensors: Mapping[str, np.ndarray], local: str, dtype: Any) -> np.ndarray:
    """Return a tensor of a layer.

    Raises
    ------
    FormatError
        It is missing or has another dtype.
    """
    if local not in tensors:
        raise FormatError(f"{name} has no {local}; its tensors are {', '.join(sorted(tensors))}")
    tensor = tensors[local]
    if tensor.dtype != dtype:
        raise FormatError(f"{name}.{local} must be {np.dtype(dtype).name}, not {tensor.dtype}")
    return tensor


def only_scheme(layers: Mapping[str, QuantScheme], form: str) -> QuantScheme:
    """Return the one scheme of all quantized layers.

    Raises
    ------
    FormatError
        There are several; names them.
    """
    schemes = {str(scheme): scheme for scheme in layers.values() if not scheme.is_float}
    if len(schemes) != 1:
        raise FormatError(
            f"the {form} format has one scheme for all layers, not {', '.join(sorted(schemes))}",
            hint="leave layers in floating point instead, or write compressed_tensors",
        )
    return next(iter(schemes.values()))


def _per_tensor(scheme: QuantScheme) -> bool:
    return scheme.weight is not None and scheme.weight.granularity is Granularity.PER_TENSOR

"""A quantized linear layer together with what divides its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme


@dataclass(frozen=True, eq=False)
class SmoothedLinear:
    """A layer of the Golden Stick flow.

    Parameters
    ----------
    layer : QuantizedLinear
        Its codes stand for the float weight times ``smooth``.
    smooth : numpy.ndarray, float32, shape (in,), or None
        Divides the input.
    method : str
        Which algorithm made the codes.
    """

    layer: QuantizedLinear
    smooth: np.ndarray | None = None
    method: str = "rtn"

    def dequantized(self) -> np.ndarray:
        """Return the float32 weight, shape (out, in), that codes and smoothing stand for."""
        weight = np.asarray(self.layer.dequantized())
        return weight if self.smooth is None else weight / self.smooth


@dataclass(frozen=True, eq=False)
class CacheScales:
    """Scales of an int8 cache.

    Parameters
    ----------
    key, value : numpy.ndarray, float32, shape (kv_heads * head_dim,)
    rotated : bool
        Whether the scales of keys are those after the rotary embedding.
    """

    key: np.ndarray
    value: np.ndarray
    rotated: bool = True


def type_name(scheme: QuantScheme) -> str:
    """Return the name of a layer's type in a description file, such as ``W8A8_DYNAMIC``."""
    return str(scheme).removesuffix("_asym").partition("_g")[0].upper()

"""The ``float`` format: an ordinary Hugging Face checkpoint with dequantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from slim_core.errors import FormatError
from slim_core.formats.base import Format, Tensors, to_numpy
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme


class FloatFormat(Format):
    """Weights in the dtype of the model, under their original names."""

    name: ClassVar[str] = "float"

    def unsupported(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Return None: every layer has a float form."""
        return None

    def nbytes(
        self, name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str
    ) -> int:
        """Return the bytes of the dequantized weight."""
        return shape[0] * shape[1] * (4 if model_dtype == "float32" else 2)

    def encode(self, layer: QuantizedLinear) -> Tensors:
        """Return the dequantized weight and the bias."""
        tensors = {"weight": to_numpy(layer.dequantized()).astype(layer.model_dtype)}
        if layer.bias is not None:
            tensors["bias"] = to_numpy(layer.bias)
        return tensors

    def decode(
        self, name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], model_dtype: str
    ) -> QuantizedLinear:
        """Raise: a float checkpoint holds no integer codes."""
        raise FormatError(f"{name} is stored in floating point and has no codes to decode")

    def weight_file(self, model_type: str) -> str:
        """Return the name that Hugging Face libraries look for."""
        return "model"

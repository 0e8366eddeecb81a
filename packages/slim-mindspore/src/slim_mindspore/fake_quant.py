"""The calibration cell of sparse quantization."""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_core.dtypes import INT8
from slim_core.numerics import affine_params
from slim_core.scheme import Granularity, TensorScheme
from slim_mindspore.framework import ms, nn, ops

INPUT_SCHEME = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)


class MeanRange:
    """Mean over the calls of the smallest and of the largest value."""

    def __init__(self) -> None:
        self.calls = 0
        self._low = 0.0
        self._high = 0.0

    def update(self, low: float, high: float) -> None:
        """Take the range of one more call."""
        self.calls += 1
        self._low += (low - self._low) / self.calls
        self._high += (high - self._high) / self.calls

    def params(self) -> tuple[float, float]:
        """Return scale and offset for asymmetric int8."""
        low, high = (np.asarray([value], np.float32) for value in (self._low, self._high))
        scale, offset = affine_params(low, high, INPUT_SCHEME)
        return float(scale[0]), float(offset[0])


class CalibratedLinear(nn.Cell):  # type: ignore[misc]
    """Runs a linear cell on inputs that are quantized and restored (PyNative mode).

    Parameters
    ----------
    linear : Cell
        Holds the weight that stands for the integer codes.
    observing : bool
        Whether inputs still change the range.
    """

    def __init__(self, linear: Any, observing: bool = True) -> None:
        super().__init__()
        self.linear = linear
        self.range = MeanRange()
        self.observing = observing

    def construct(self, x: Any) -> Any:
        """Return the output for the quantized input."""
        if self.observing:
            self.range.update(float(x.min().asnumpy()), float(x.max().asnumpy()))
        if not self.range.calls:
            return self.linear(x)
        scale, offset = self.range.params()
        codes = ops.clamp(ops.round(ops.cast(x, ms.float32) / scale + offset), -128, 127)
        return self.linear(ops.cast((codes - offset) * scale, x.dtype))

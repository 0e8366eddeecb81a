"""The fused operators of Ascend for quantized linear layers.

Experimental: the calls follow the operators' signatures and Golden Stick's use of them, and are
tested with stand-ins; they have not run on Ascend hardware.  The operators take float16
activations; inputs and outputs here are float32 like everything around.
"""

from __future__ import annotations

from typing import Any

from slim_mindspore.framework import ms, nn, ops


def on_ascend() -> bool:
    """Whether cells built now will run on Ascend."""
    return bool(ms.get_context("device_target") == "Ascend")


def operators() -> Any:
    """Return the module of the operators; CPU builds have their classes but no kernels."""
    return ops.auto_generate


class FusedWeightOnly(nn.Cell):  # type: ignore[misc]
    """``x @ ((codes + zero) * scale).T`` for int8 codes with a scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = operators().WeightQuantBatchMatmul(False, True, 0)

    def construct(self, x: Any, codes: Any, scale: Any, zero: Any) -> Any:
        """Return the float32 products."""
        scale, zero = ops.cast(scale, ms.float16), ops.cast(zero, ms.float16)
        y = self.matmul(ops.cast(x, ms.float16), codes, scale, zero, None, None, None)
        return ops.cast(y, ms.float32)


class FusedStatic(nn.Cell):  # type: ignore[misc]
    """``(round(x / scale + zero) @ codes.T + bias) * dequant_scale``."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = operators().QuantV2()
        self.matmul = operators().QuantBatchMatmul(False, True, ms.float16)

    def construct(
        self, x: Any, scale: Any, zero: Any, codes: Any, dequant_scale: Any, bias: Any
    ) -> Any:
        """Return the float32 outputs; ``dequant_scale`` holds bits of float32 in int64."""
        x, scale = ops.cast(x, ms.float16), ops.cast(scale, ms.float16)
        quantized = self.quant(x, scale, zero, False, "ROUND", ms.int8)
        return ops.cast(self.matmul(quantized, codes, dequant_scale, None, bias, None), ms.float32)


class FusedDynamic(nn.Cell):  # type: ignore[misc]
    """The product of tokens, quantized with a scale of their own each, and int8 codes."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = operators().DynamicQuantExt()
        self.matmul = operators().QuantBatchMatmul(False, True, ms.float16)

    def construct(self, x: Any, smooth: Any, codes: Any, weight_scale: Any) -> Any:
        """Return the float32 outputs; ``smooth`` multiplies the input, None for none."""
        if smooth is not None:
            smooth = ops.cast(smooth, ms.float16)
        quantized, scale = self.quant(ops.cast(x, ms.float16), smooth)
        y = self.matmul(quantized, codes, weight_scale, None, None, scale)
        return ops.cast(y, ms.float32)

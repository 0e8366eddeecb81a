"""What the ``ascend_v1`` format, with the names of Hugging Face, can hold of a network."""

from __future__ import annotations

from slim_core.errors import FormatError, InvalidValueError
from slim_mindspore.quantization_config import QuantizationConfig


def check_ascend(config: QuantizationConfig) -> None:
    """Require that the ``ascend_v1`` format can hold what a configuration makes.

    Raises
    ------
    FormatError
        Smoothing scales divide inputs, the cache has scales per token, or a scheme has no type.
    """
    smoothed = any(policy.outliers_suppression for policy in config.policies)
    if smoothed and config.smooth_into == "input":
        raise FormatError(
            "ascend_v1 has no place for scales that divide the input, so outliers_suppression "
            "needs smooth_into norm",
            hint="or write a .ckpt or .safetensors file (layout gs-ptq)",
        )
    if config.kvcache_quant_granularity == "per_token":
        raise FormatError("ascend_v1 holds a cache with fixed scales only, not one per token")
    for scheme in (policy.scheme() for policy in config.policies):
        try:
            scheme.ascend_type  # noqa: B018  (the property checks)
        except InvalidValueError as error:
            raise FormatError(
                f"ascend_v1 has no type for {scheme}",
                hint="write a .ckpt or .safetensors file (layout gs-ptq)",
            ) from error

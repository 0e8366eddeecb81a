"""The names of ready-made configurations on the command line."""

from __future__ import annotations

from typing import Any

from slim_core.errors import InvalidValueError
from slim_core.validate import check_choice
from slim_mindspore.quantization_config import QuantizationConfig

_PRESETS: dict[str, dict[str, Any]] = {
    "rtn-a16w8": {
        "quant_method": "rtn",
        "weight_dtype": "int8",
        "modules_to_not_convert": ["lm_head"],
    },
    "rtn-c8": {"quant_method": "rtn", "kvcache_dtype": "int8"},
    "smooth_quant": {
        "quant_method": "smooth_quant",
        "weight_dtype": "int8",
        "activation_dtype": "int8",
        "outliers_suppression": "smooth",
        "modules_to_not_convert": ["lm_head", "w2"],
    },
    "ptq": {"quant_method": "ptq", "modules_to_not_convert": ["lm_head"]},
}
APPROACHES = tuple(_PRESETS)
_OPEN = ("modules_to_not_convert", "algorithm_args", "weight_range", "smooth_into")


def from_approach(approach: str, overrides: dict[str, Any]) -> QuantizationConfig:
    """Return the configuration of an approach, changed by what was given in addition.

    Parameters
    ----------
    approach : str
        ``rtn-a16w8``, ``rtn-c8``, ``smooth_quant`` or ``ptq``.
    overrides : dict
        Keys of :class:`QuantizationConfig`; only ``ptq`` leaves dtypes and algorithms open.

    Raises
    ------
    InvalidValueError
        The approach is unknown, or an option contradicts it.
    RecipeError
        The combination is not valid.
    """
    preset = _PRESETS[check_choice("approach", approach, _PRESETS)]
    for key, value in overrides.items():
        if approach != "ptq" and key not in _OPEN and preset.get(key) != value:
            raise InvalidValueError(
                f"approach {approach} fixes {key} to {preset.get(key)!r}, it cannot be {value!r}",
                hint="approach ptq leaves it open",
            )
    return QuantizationConfig.from_dict(preset | overrides, f"approach {approach}")

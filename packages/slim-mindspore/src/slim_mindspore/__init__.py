"""Quantization and low-rank decomposition of MindSpore networks.

Names are loaded when they are used: importing the package does not import MindSpore.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slim_mindspore.__about__ import __version__

if TYPE_CHECKING:
    from slim_mindspore.calibrator import Calibrator
    from slim_mindspore.config import QuantConfig
    from slim_mindspore.hub import load_llama
    from slim_mindspore.load import load_quantized
    from slim_mindspore.lowrank import Decompose, count_parameters
    from slim_mindspore.moments import next_token_loss
    from slim_mindspore.quantization_config import QuantizationConfig
    from slim_mindspore.quantize import quantize_network
    from slim_mindspore.save import save_ascend, save_quantized

_HOMES = {
    "Calibrator": "calibrator",
    "Decompose": "lowrank",
    "QuantConfig": "config",
    "QuantizationConfig": "quantization_config",
    "count_parameters": "lowrank",
    "load_llama": "hub",
    "load_quantized": "load",
    "next_token_loss": "moments",
    "quantize_network": "quantize",
    "save_ascend": "save",
    "save_quantized": "save",
}

__all__ = [
    "Calibrator",
    "Decompose",
    "QuantConfig",
    "QuantizationConfig",
    "__version__",
    "count_parameters",
    "load_llama",
    "load_quantized",
    "next_token_loss",
    "quantize_network",
    "save_ascend",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

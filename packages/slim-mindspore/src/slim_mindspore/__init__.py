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

_HOMES = {
    "Calibrator": "calibrator",
    "QuantConfig": "config",
}

__all__ = ["Calibrator", "QuantConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Low-rank decomposition of Linear, Embedding and Conv layers that keeps quality.

Importing this package needs numpy and scipy only; what needs torch is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slim_core.errors import MissingDependencyError
from slim_core.logging import set_logger_level
from slim_lowrank.__about__ import __version__

if TYPE_CHECKING:
    from slim_lowrank.compat import Decompose
    from slim_lowrank.helpers import count_parameters, safe_torch_load, safe_torch_save

_TORCH_NAMES = {
    "Decompose": "compat",
    "count_parameters": "helpers",
    "safe_torch_load": "helpers",
    "safe_torch_save": "helpers",
}

__all__ = [
    "Decompose",
    "__version__",
    "count_parameters",
    "safe_torch_load",
    "safe_torch_save",
    "set_logger_level",
]


def __getattr__(name: str) -> Any:
    if name not in _TORCH_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_TORCH_NAMES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(
            f"slim_lowrank.{name} needs torch", hint="pip install 'slim-lowrank[torch]'"
        ) from error
    return getattr(module, name)

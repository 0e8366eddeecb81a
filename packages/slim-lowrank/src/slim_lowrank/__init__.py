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
    from slim_lowrank.budget import Budget
    from slim_lowrank.calibrate import output_loss
    from slim_lowrank.compat import Decompose
    from slim_lowrank.decomposer import Decomposer
    from slim_lowrank.helpers import count_parameters, safe_torch_load, safe_torch_save
    from slim_lowrank.merging import merge
    from slim_lowrank.pretrained import load_pretrained, save_pretrained

_LAZY = {
    "Budget": "budget",
    "Decomposer": "decomposer",
    "output_loss": "calibrate",
    "Decompose": "compat",
    "load_pretrained": "pretrained",
    "merge": "merging",
    "save_pretrained": "pretrained",
    "count_parameters": "helpers",
    "safe_torch_load": "helpers",
    "safe_torch_save": "helpers",
}
_EXTRAS = {"torch": "torch", "transformers": "hf", "accelerate": "hf"}

__all__ = [
    "Budget",
    "Decompose",
    "Decomposer",
    "__version__",
    "count_parameters",
    "load_pretrained",
    "merge",
    "output_loss",
    "safe_torch_load",
    "safe_torch_save",
    "save_pretrained",
    "set_logger_level",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        raise MissingDependencyError(
            f"slim_lowrank.{name} needs {error.name}", hint=f"pip install 'slim-lowrank[{extra}]'"
        ) from error
    return getattr(module, name)

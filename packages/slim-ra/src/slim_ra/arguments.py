"""What a model calls its arguments, which differs between versions of transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from slim_core.errors import StructureError

_CACHE = ("cache", "past_key_values")


def cache_argument(model: Any) -> str:
    """Return the name under which a model or an attention module takes its key-value cache.

    ``cache`` from transformers 5.24 on, ``past_key_values`` before.  Of a wrapper that hands on
    whatever it is given, it is the name in the model inside.

    Raises
    ------
    StructureError
        The model takes no cache under either name.
    """
    for module in model.modules():
        name = _cache_argument(type(module).forward)
        if name is not None:
            return name
    raise StructureError(
        f"{type(model).__name__} takes no key-value cache: its forward has no argument "
        f"{' or '.join(_CACHE)}"
    )


@functools.cache  # attention modules ask at every token
def _cache_argument(forward: Callable[..., Any]) -> str | None:
    taken = inspect.signature(forward).parameters
    return next((name for name in _CACHE if name in taken), None)

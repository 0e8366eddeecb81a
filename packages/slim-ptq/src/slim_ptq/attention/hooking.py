"""Calling a quantizer from the attention function of transformers.

An attention function is registered under a name of its own for each implementation (``sdpa``,
``eager``, ...): it hands queries, keys and values to the quantizer of the calling module and goes
on with the function of that implementation.  No modeling file is changed, and modules without a
quantizer compute what they did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from slim_ptq.attention.states import StatesQuantizer

CHILD = "fa_quantizer"
_PREFIX = "slim_fa_"


def uses_attention_functions(module: nn.Module) -> bool:
    """Tell whether the code of an attention module is written for exchangeable functions."""
    config = getattr(module, "config", None)
    return hasattr(config, "_attn_implementation") and any(
        hasattr(home, "ALL_ATTENTION_FUNCTIONS") for home in _homes(module)
    )


def hook(module: nn.Module, quantizer: StatesQuantizer) -> None:
    """Let the attention function of a module call the quantizer, which becomes its child."""
    quantizer.hooked = True
    module.add_module(CHILD, quantizer)
    config: Any = module.config
    base = config._attn_implementation or "eager"
    if not base.startswith(_PREFIX):
        config._attn_implementation = _register(base)


def unhook(module: nn.Module) -> None:
    """Take the quantizer away; the attention function of its model stays, and does nothing."""
    delattr(module, CHILD)


def _register(base: str) -> str:
    """Register the attention function that goes on with ``base``, and the masks of ``base``."""
    import transformers
    from transformers import masking_utils

    functions: Any = transformers.AttentionInterface
    masks: Any = masking_utils.AttentionMaskInterface

    name = f"{_PREFIX}{base}"
    if name not in functions._global_mapping:
        functions.register(name, _through_quantizer(base))
        masks.register(name, masks._global_mapping[base])
    return name


def _through_quantizer(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        quantizer = getattr(module, CHILD, None)
        if isinstance(quantizer, StatesQuantizer) and quantizer.hooked:
            query, key, value = (
                quantizer.quant(states, part)
                for states, part in ((query, "q"), (key, "k"), (value, "v"))
            )
        return _function(module, base)(module, query, key, value, *args, **kwargs)

    return attention


def _function(module: nn.Module, base: str) -> Callable[..., Any]:
    """Return the attention function that the code of a module calls for an implementation."""
    for home in _homes(module):
        if base == "eager" and hasattr(home, "eager_attention_forward"):
            return home.eager_attention_forward  # type: ignore[no-any-return]
        if base != "eager" and hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
            return home.ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]
    raise KeyError(f"{type(module).__name__} has no attention function {base}")


def _homes(module: nn.Module) -> list[Any]:
    """Return the Python modules in which the class and its bases are defined."""
    return [sys.modules[kind.__module__] for kind in type(module).__mro__[:-1]]

"""Run a model and look at the queries, keys and log-sum-exps of every attention layer.

Works with whatever attention implementation the model was loaded with; it is put back afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slim_core.errors import StructureError
from slim_ra.families import Family, alibi_modules, family_modules
from slim_ra.geometry import position_encoding, require_decoder, text_config
from slim_ra.lse import attention_lse, with_sink

PROBE = "slim_ra_probe"


@dataclass(frozen=True)
class Attention:
    """What one attention layer computed.

    Attributes
    ----------
    layer : int
    query : Tensor
        ``[B, Hq, T, D]``, rotated.
    key : Tensor
        ``[B, Hkv, T, D]``, rotated.
    lse : Tensor
        fp32 ``[B, Hq, T]``; a probability is ``exp(logit - lse)``.
    scale : float
    window : int or None
        Sliding window of this layer.
    softcap : float or None
    bias : Tensor or None
        fp32 ``[B or 1, Hq, T]``, the ALiBi bias of each key column.
    """

    layer: int
    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    bias: Tensor | None = None


Observer = Callable[[Attention], None]
_observer: ContextVar[Observer | None] = ContextVar("slim_ra_observer", default=None)


@contextlib.contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call ``observer`` with every attention layer of every forward pass in the block.

    The passes must be causal, unpadded and without a cache.

    Raises
    ------
    StructureError
        The model has neither rotary nor ALiBi positions, or its attention cannot be looked into.
    """
    require_decoder(model)
    encoding = position_encoding(model)
    if encoding is None:
        raise StructureError(
            f"{type(model).__name__} has neither rotary nor ALiBi position encoding",
            hint="RazorAttention is defined for these two only",
        )
    if getattr(text_config(model.config), "attention_chunk_size", None):
        raise StructureError(f"{type(model).__name__} uses chunked attention, which is unsupported")
    with contextlib.ExitStack() as stack:
        token = _observer.set(observer)
        stack.callback(_observer.reset, token)
        if encoding == "alibi":
            stack.enter_context(_patched_families(alibi_modules(model)))
        elif families := family_modules(model):
            stack.enter_context(_patched_families(families))
        elif uses_interface(model):
            _register_probe()
            stack.enter_context(attention_implementation(model, PROBE))
        elif attn_modules(model):
            stack.enter_context(_patched_attn(model))
        else:
            stack.enter_context(_SdpaMode())
        yield


def uses_interface(model: Any) -> bool:
    """Whether the model calls the attention interface of transformers."""
    name = "_can_set_attn_implementation"
    return bool(hasattr(model, name) and getattr(model, name)())


@contextlib.contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """Set the attention implementation of the model and its submodels; put the old ones back."""
    configs: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            configs.setdefault(id(config), (config, config._attn_implementation))
    try:
        model.set_attn_implementation(name)
        if text_config(model.config)._attn_implementation != name:
            raise StructureError(
                f"{type(model).__name__} refused the attention implementation {name!r}"
            )
        yield
    finally:
        for config, previous in configs.values():
            config._attn_implementation = previous


def report(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute causal attention ``[B, Hq, T, Dv]`` and tell the observer about it."""
    observer = _observer.get()
    if observer is None:
        raise StructureError(f"the attention {PROBE!r} was called outside of a head search")
    if query.shape[2] != key.shape[2]:
        raise StructureError("a head search must run without a cache")
    tight = window if window is not None and window < key.shape[2] else None
    rows = None if bias is None else bias[:, :, None, :]
    output, lse = attention_lse(
        query, key, value, scale=scale, causal=True, bias=rows, window=tight, softcap=softcap
    )
    output, lse = with_sink(output, lse, sink)
    observer(Attention(layer, query, key, lse, scale, window, softcap, bias))
    return output


def probe_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers that reports to the observer."""
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise StructureError(f"{type(module).__name__} adds a mask or bias of its own to attention")
    if getattr(module, "is_causal", True) is False:
        raise StructureError(f"{type(module).__name__} is not causal")
    output = report(
        module.layer_idx,
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sink=kwargs.get("s_aux"),
    )
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Mask function of the probe: causality and windows are the attention function's business."""
    return None


def _register_probe() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBE, probe_attention)
    AttentionMaskInterface.register(PROBE, _no_mask)


@contextlib.contextmanager
def _patched_families(modules: list[tuple[Any, Family]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for index, (module, family) in enumerate(modules):

            def forward(
                *args: Any,
                _module: Any = module,
                _family: Any = family,
                _i: int = index,
                **kwargs: Any,
            ) -> tuple[Tensor, None]:
                call = _family.call(_module, args, kwargs)
                query, key, value = _family.project(call)
                bias = _family.columns(call, key.shape[2])
                scale = _family.scale(_module)
                output = report(_i, query, key, value, scale=scale, bias=bias)
                context: tuple[Tensor, None] = _family.finish(
                    call, output.transpose(1, 2).flatten(2).to(call.hidden.dtype)
                )
                return context

            stack.enter_context(replaced(module, "forward", forward))
        yield


@contextlib.contextmanager
def _patched_attn(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for index, module in enumerate(attn_modules(model)):

            def attn(
                query: Tensor,
                key: Tensor,
                value: Tensor,
                *args: Any,
                _i: int = index,
                _scale: float = 1.0 / float(module.scale_attn),
                **kwargs: Any,
            ) -> tuple[Tensor, None]:
                return report(_i, query, key, value, scale=_scale), None

            stack.enter_context(replaced(module, "_attn", attn))
        yield


def attn_modules(model: nn.Module) -> list[Any]:
    """Attention modules with ``_attn(query, key, value, mask)``: GPT-J, CodeGen before 5.24."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "_attn") and hasattr(module, "scale_attn")
    ]


@contextlib.contextmanager
def replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Shadow a method of one module instance."""
    earlier = module.__dict__.get(name)
    object.__setattr__(module, name, function)
    try:
        yield
    finally:
        if earlier is None:
            object.__delattr__(module, name)
        else:
            object.__setattr__(module, name, earlier)


class _SdpaMode(TorchFunctionMode):
    """For models that call torch's scaled_dot_product_attention themselves: one call a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (
            args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
        )
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        layer, self.calls = self.calls, self.calls + 1
        return report(layer, query, key, value, scale=scale)

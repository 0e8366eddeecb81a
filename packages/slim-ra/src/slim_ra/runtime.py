"""Setting a model up for RazorCache, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from slim_core.errors import StructureError
from slim_core.files import PathLike
from slim_ra.attention import NAME, razor_attention, razor_mask, take_layer
from slim_ra.cache import RazorCache, enabled
from slim_ra.families import Family, alibi_modules, family_modules
from slim_ra.geometry import Encoding, position_encoding, require_decoder, text_config
from slim_ra.layer import RazorLayer
from slim_ra.observe import attention_implementation, attn_modules, replaced, uses_interface
from slim_ra.padding import mask_padding
from slim_ra.policy import RazorPolicy

_undo: dict[int, contextlib.ExitStack] = {}


def enable(model: Any) -> None:
    """Let the model attend through a :class:`RazorCache` when it is given one.

    Without one it works as before.  Enabling twice changes nothing.

    Raises
    ------
    StructureError
        The model has neither rotary nor ALiBi positions, or computes attention in a way that
        cannot be led through the cache.
    """
    if id(model) in _undo:
        return
    require_decoder(model)
    encoding = position_encoding(model)
    if encoding is None:
        raise StructureError(
            f"{type(model).__name__} has neither rotary nor ALiBi position encoding",
            hint="RazorAttention is defined for these two only",
        )
    with contextlib.ExitStack() as stack:
        patches = list(_patches(model, encoding))
        for patch in patches:
            stack.enter_context(patch)
        if not patches and not uses_interface(model):
            raise StructureError(
                f"{type(model).__name__} does not use the attention interface of transformers"
            )
        if not patches:
            _register()
            stack.enter_context(attention_implementation(model, NAME))
        # The next layer notices one that did not attend; after the last there is only this hook.
        hook = model.base_model.register_forward_hook(_check_cache, with_kwargs=True)
        stack.callback(hook.remove)
        config = text_config(model.config)
        enabled[id(config)] = config
        stack.callback(enabled.pop, id(config), None)
        _undo[id(model)] = stack.pop_all()


def disable(model: Any) -> None:
    """Put the model back as it was before :func:`enable`."""
    stack = _undo.pop(id(model), None)
    if stack is not None:
        stack.close()


@contextlib.contextmanager
def razor(
    model: Any, policy: RazorPolicy | PathLike, *, mode: str = "incremental", **options: Any
) -> Iterator[Callable[[], RazorCache]]:
    """Enable the model in a block and hand out caches for it.

    Parameters
    ----------
    model : PreTrainedModel
    policy : RazorPolicy or path
        A policy, or a ``win.pt`` (or another dialect) to make one from with ``options``.
    mode : {"incremental", "prefill"}
        See :class:`RazorCache`.

    Yields
    ------
    callable
        Makes a fresh cache.

    Examples
    --------
    Before transformers 5.24 the argument is called ``past_key_values``.

    >>> with razor(model, "win.pt") as new_cache:  # doctest: +SKIP
    ...     model.generate(ids, cache=new_cache(), max_new_tokens=64)
    """
    if not isinstance(policy, RazorPolicy):
        policy = RazorPolicy.from_file(policy, model.config, **options)
    elif options:
        raise TypeError(f"{', '.join(options)} can only be given along with a file")
    fixed = policy
    was_enabled = id(model) in _undo
    enable(model)
    try:
        yield lambda: RazorCache(model.config, fixed, mode=mode)
    finally:
        if not was_enabled:
            disable(model)


def _check_cache(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, RazorCache):
            value.check_consumed()


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, razor_attention)
    # Without a mask function of the same name transformers would drop padding without a word.
    AttentionMaskInterface.register(NAME, razor_mask)


def _patches(model: Any, encoding: Encoding) -> Iterator[AbstractContextManager[None]]:
    """Yield what leads the attention of each module that does not use the interface."""
    alibi = encoding == "alibi"
    for module, family in alibi_modules(model) if alibi else family_modules(model):
        forward = _family_forward(module, family, module.forward, alibi=alibi)
        yield replaced(module, "forward", forward)
    for module in attn_modules(model):
        yield replaced(module, "_attn", _attn_method(module, module._attn))


def _family_forward(
    module: Any, family: Family, original: Callable[..., Any], *, alibi: bool
) -> Callable[..., Any]:
    """Make the forward of one attention module of a known family that knows RazorCache."""
    slopes = family.slopes(module) if alibi else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = family.call(module, args, kwargs)
        if not isinstance(call.cache, RazorCache):
            return original(*args, **kwargs)
        _check_plain(module, **kwargs)
        layer: RazorLayer = call.cache.layers[module.layer_idx]
        layer.alibi, layer.slopes = alibi, slopes
        query, key, value = family.project(call)
        pads = None if layer.seen else family.padding(call)
        layer.update(key, value)
        columns = family.columns(call, layer.seen + key.shape[2])
        output = layer.attend(query, scale=family.scale(module), pads=pads, columns=columns)
        context: Tensor = output.transpose(1, 2).flatten(2)
        return family.finish(call, context)

    return forward


def _attn_method(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the ``_attn`` of GPT-J and CodeGen, before transformers 5.24, that knows RazorCache."""
    scale = 1.0 / float(module.scale_attn)

    def attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> Any:
        layer = take_layer(key)
        if layer is None:
            more = () if head_mask is None else (head_mask,)
            return original(query, key, value, attention_mask, *more)
        _check_plain(module, head_mask=head_mask)
        pads = None if layer.seen else mask_padding(attention_mask, key.shape[2])
        return layer.attend(query, scale=scale, pads=pads).to(value.dtype), None

    return attn


def _check_plain(
    module: Any, head_mask: Any = None, output_attentions: Any = None, **_: Any
) -> None:
    """Refuse what a RazorCache cannot do and would otherwise pass over in silence."""
    if head_mask is not None:
        raise StructureError("head masks are unsupported with a RazorCache")
    if output_attentions:
        raise StructureError("output_attentions needs whole attention matrices; they never exist")
    if module.training:
        raise StructureError("a RazorCache is for inference: call model.eval()")

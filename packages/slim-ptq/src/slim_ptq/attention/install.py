"""Which attention modules of a model are quantized, and the quantizers in them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from torch import nn

from slim_core.errors import StructureError
from slim_ptq.attention.fa_quantizer import FAQuantizer
from slim_ptq.attention.hooking import hook, uses_attention_functions

_QUIET = logging.Logger("slim_ptq.attention", logging.CRITICAL)  # transformers checked the config


def find_quantizers(root: nn.Module) -> dict[str, FAQuantizer]:
    """Return the quantizers below ``root`` by the name of the attention module that holds them."""
    return {
        name.rpartition(".")[0]: module
        for name, module in root.named_modules()
        if isinstance(module, FAQuantizer)
    }


def install_quantizers(root: nn.Module, names: Iterable[str]) -> dict[str, FAQuantizer]:
    """Give attention modules a quantizer; those that make one themselves keep it.

    Parameters
    ----------
    names : iterable of str
        Attention modules below ``root`` that :func:`reachable_attention` returned.
    """
    own = find_quantizers(root)
    found: dict[str, FAQuantizer] = {}
    for name in names:
        found[name] = own.get(name) or FAQuantizer(root.get_submodule(name).config, _QUIET)
        if name not in own:
            hook(root.get_submodule(name), found[name])
    return found


def reachable_attention(
    root: nn.Module, blocks: Iterable[str], disabled: Collection[str] = ()
) -> list[str]:
    """Return the names of the attention modules of the decoder blocks that are to be quantized.

    Parameters
    ----------
    blocks : iterable of str
        Names of the decoder blocks below ``root``; an empty name is ``root`` itself.
    disabled : collection of str
        Attention modules that stay in floating point.

    Raises
    ------
    StructureError
        An attention module neither has a quantizer nor uses the attention functions of
        transformers, or there is no attention module.
    """
    own = find_quantizers(root)
    modules = attention_modules(root, blocks)
    found = [name for name in modules if name not in disabled]
    for name in found:
        if name not in own and not uses_attention_functions(modules[name]):
            raise StructureError(
                f"{name} ({type(modules[name]).__name__}) does not use the attention functions of "
                "transformers, so its queries, keys and values cannot be reached",
                hint="call a FAQuantizer in its code, or leave it out by disable_names "
                "(attention.exclude in a recipe)",
            )
    if not found:
        raise StructureError(f"{type(root).__name__} has no attention module to quantize")
    return found


def check_called(quantizers: dict[str, FAQuantizer], prefix: str = "") -> None:
    """Require that every quantizer has seen queries, keys and values.

    Parameters
    ----------
    prefix : str
        Put before the names, for messages.

    Raises
    ------
    StructureError
        Lists the quantizers that did not.
    """
    silent = {prefix + name: found.missing for name, found in quantizers.items() if found.missing}
    if silent:
        listed = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in silent.items())
        raise StructureError(
            f"FAQuantizer.quant was not called for {listed}",
            hint="call it for q, k and v in the attention module, or leave it out by disable_names "
            "(attention.exclude in a recipe)",
        )


def attention_modules(root: nn.Module, blocks: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules of the blocks that hold a quantizer, or else are called attention.

    Of modules within one another the innermost counts, unless one holds a quantizer.
    """
    own = find_quantizers(root)
    found: dict[str, nn.Module] = {}
    for block in blocks:
        for local, module in root.get_submodule(block).named_modules():
            name = ".".join(part for part in (block, local) if part)
            outer = [known for known in found if name.startswith(f"{known}.")]
            if any(known in own for known in outer):
                continue
            if name in own or "Attention" in type(module).__name__:
                for known in outer:
                    del found[known]
                found[name] = module
    return found

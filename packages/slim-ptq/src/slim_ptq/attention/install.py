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


def install_quantizers(
    root: nn.Module, blocks: Iterable[str], disabled: Collection[str] = ()
) -> dict[str, FAQuantizer]:
    """Give every attention module of the decoder blocks a quantizer.

    Modules that make one themselves keep it.

    Parameters
    ----------
    blocks : iterable of str
        Names of the decoder blocks below ``root``; an empty name is ``root`` itself.
    disabled : collection of str
        Attention modules that stay in floating point.

    Returns
    -------
    dict
        The quantizers by the name of the attention module; not those of disabled modules.

    Raises
    ------
    StructureError
        An attention module neither has a quantizer nor uses the attention functions of
        transformers, or there is no attention module.
    """
    own = find_quantizers(root)
    found: dict[str, FAQuantizer] = {}
    for name, module in attention_modules(root, blocks).items():
        if name in disabled:
            continue
        if name in own:
            found[name] = own[name]
        elif uses_attention_functions(module):
            found[name] = FAQuantizer(module.config, _QUIET)
            hook(module, found[name])
        else:
            raise StructureError(
                f"{name} ({type(module).__name__}) does not use the attention functions of "
                "transformers, so its queries, keys and values cannot be reached",
                hint="call a FAQuantizer in its code, or name it in disable_names",
            )
    if not found:
        raise StructureError(f"{type(root).__name__} has no attention module to quantize")
    return found


def check_called(quantizers: dict[str, FAQuantizer]) -> None:
    """Require that every quantizer has seen queries, keys and values.

    Raises
    ------
    StructureError
        Lists the quantizers that did not.
    """
    silent = {name: found.missing for name, found in quantizers.items() if found.missing}
    if silent:
        listed = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in silent.items())
        raise StructureError(
            f"FAQuantizer.quant was not called for {listed}",
            hint="call it for q, k and v in the attention module, or name it in disable_names",
        )


def attention_modules(root: nn.Module, blocks: Iterable[str]) -> dict[str, nn.Module]:
    """Return the innermost modules of the blocks that hold a quantizer or are called attention."""
    found: dict[str, nn.Module] = {}
    for block in blocks:
        for local, module in root.get_submodule(block).named_modules():
            holds = any(isinstance(child, FAQuantizer) for child in module.children())
            if holds or "Attention" in type(module).__name__:
                name = ".".join(part for part in (block, local) if part)
                for outer in [known for known in found if name.startswith(f"{known}.")]:
                    del found[outer]
                found[name] = module
    return found

"""Models whose weights accelerate keeps in host memory or on disk (``device_map``).

Such a module has its parameters on the meta device; a hook brings them to the device of execution
for the time of a call.  Here they are brought for the time of a ``with`` block, what was changed
goes back to where it came from, and a module that takes the place of another is kept like it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slim_core.errors import StructureError
from slim_ptq.structure import find_fused_experts


def place(model: nn.Module, device: str | torch.device) -> None:
    """Move a model to a device, unless accelerate has placed its parts.

    Raises
    ------
    StructureError
        It has offloaded experts that are fused, which cannot be taken apart.
    """
    if not is_dispatched(model):
        model.to(device)
        return
    for name in find_fused_experts(model):
        if any(hook.offload for hook in _hooks(model.get_submodule(name))):
            raise StructureError(
                f"the fused experts {name} are offloaded, and cannot be taken apart",
                hint="quantize the model directory with slim_ptq.quantize, a block at a time, or "
                "load the model without offloading",
            )


def is_dispatched(model: nn.Module) -> bool:
    """Tell whether accelerate moves data or weights of the model between devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def input_device(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs."""
    for module in model.modules():
        for hook in _hooks(module):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device


@contextlib.contextmanager
def resident(root: nn.Module, *, recurse: bool = True, changed: bool = False) -> Iterator[None]:
    """Hold the offloaded tensors of a module on its device of execution.

    Parameters
    ----------
    recurse : bool
        Also those of the modules below it.
    changed : bool
        Write all of them back when the context is left without an exception, those of parameters
        that were added too.
    """
    owners = [
        (module, hook)
        for module in (root.modules() if recurse else [root])
        for hook in _hooks(module)
        if hook.offload
    ]
    for module, hook in owners:
        hook.offload = False
        for name, tensor in _tensors(module, hook):
            _set(module, name, hook.weights_map[name].to(hook.execution_device), tensor)
    try:
        yield
        if changed:
            for module, hook in owners:
                for name, tensor in _tensors(module, hook):
                    _store(hook.weights_map, name, tensor)
    finally:
        for module, hook in owners:
            hook.offload = True
            for name, tensor in _tensors(module, hook):
                _set(module, name, torch.empty_like(tensor, device="meta"), tensor)


def keep_like(new: nn.Module, old: nn.Module, prefix: str) -> None:
    """Offload the buffers of a module as those of the module are whose place it takes.

    Parameters
    ----------
    prefix : str
        Of the names under which the buffers are stored, beside those of ``old``.
    """
    hooks = [hook for hook in _hooks(old) if hook.offload]
    if not hooks:
        return
    accelerate = _accelerate("hooks")
    hook = hooks[0]
    weights = _accelerate("utils.offload").PrefixedDataset(hook.weights_map, prefix)
    for name, buffer in new.named_buffers():
        _store(weights, name, buffer)
    accelerate.add_hook_to_module(
        new,
        accelerate.AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=True,
            io_same_device=hook.io_same_device,
            weights_map=weights,
            offload_buffers=True,
        ),
    )


def discard(module: nn.Module) -> None:
    """Delete the stored tensors of a module that :func:`keep_like` offloaded."""
    for hook in _hooks(module):
        if hook.offload:
            for name, _ in _tensors(module, hook):
                _delete(hook.weights_map, name)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate that align the devices of a module."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if hasattr(part, "execution_device") and hasattr(part, "offload"):
            yield part


def _tensors(module: nn.Module, hook: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors that a hook offloads, by the names that it uses."""
    found: list[tuple[str, torch.Tensor]] = []
    found += module.named_parameters(recurse=hook.place_submodules)
    if hook.offload_buffers:
        found += [
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=hook.place_submodules)
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set
        ]
    return found


def _set(module: nn.Module, name: str, value: torch.Tensor, old: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if isinstance(old, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        owner._buffers[leaf] = value


def _store(weights: Any, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor into the store of offloaded weights: a mapping, or files."""
    store, name = _whole(weights, name)
    tensor = tensor.detach()
    if not _is_loader(store):
        store[name] = tensor.to("cpu", copy=True)
        return
    if store.save_folder is None or name in store.state_dict:
        store.state_dict[name] = tensor.to("cpu", copy=True)
    else:
        _accelerate("utils.offload").offload_weight(tensor, name, store.save_folder, store.index)
    if name not in store.all_keys:
        store.all_keys.append(name)


def _delete(weights: Any, name: str) -> None:
    store, name = _whole(weights, name)
    if not _is_loader(store):
        del store[name]
        return
    store.all_keys.remove(name)
    if store.state_dict.pop(name, None) is None:
        del store.index[name]
        Path(store.save_folder, f"{name}.dat").unlink()


def _whole(weights: Any, name: str) -> tuple[Any, str]:
    """Return the store below all prefixes, and the name in it."""
    while isinstance(weights, _accelerate("utils.offload").PrefixedDataset):
        name, weights = f"{weights.prefix}{name}", weights.dataset
    return weights, name


def _is_loader(store: Any) -> bool:
    return isinstance(store, _accelerate("utils.offload").OffloadedWeightsLoader)


def _accelerate(name: str) -> Any:
    """Return a module of accelerate, which whoever dispatched the model has imported."""
    return sys.modules[f"accelerate.{name}"]

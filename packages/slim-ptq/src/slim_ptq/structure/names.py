"""Names of parameters in the checkpoint on disk, where they differ from those in the model.

transformers renames parameters while loading (``block_sparse_moe`` to ``mlp``, prefixes of
multimodal models) and turns the names back while saving.  This follows what saving would do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from slim_ptq.structure.experts import UnfusedExperts


def checkpoint_names(model: nn.Module) -> Callable[[str], str]:
    """Return the function from a parameter name in ``model`` to its name in the checkpoint.

    Parameters
    ----------
    model : nn.Module
        A transformers model, before or after ``unfuse_experts``; the names of any other model stay
        as they are.

    Returns
    -------
    callable
        Maps the full name of a parameter or buffer.  The new parameters of unfused experts get the
        names under which checkpoints hold one expert.  Other suffixes of a known module
        (``q_proj.weight_scale``) get the prefix that its weight has.
    """
    known = _ordinary_names(model)
    known.update(_expert_names(model, known))
    prefixes = {_parent(name): _parent(saved) for name, saved in known.items()}

    def rename(name: str) -> str:
        if name in known:
            return known[name]
        parent, _, leaf = name.rpartition(".")
        return f"{prefixes[parent]}.{leaf}" if prefixes.get(parent) else name

    return rename


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ordinary_names(model: nn.Module) -> dict[str, str]:
    """Names of all entries of the state dict; one that saving merges with others keeps its own."""
    inside = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, UnfusedExperts)
    )
    shapes = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside)
    }
    sources = {id(tensor): name for name, tensor in shapes.items()}
    found = {name: name for name in shapes}
    for saved, tensor in _saved(model, shapes).items():
        if id(tensor) in sources:
            found[sources[id(tensor)]] = saved
    return found


def _expert_names(model: nn.Module, known: dict[str, str]) -> dict[str, str]:
    """Names of the parameters of unfused experts, found by saving numbered stand-ins.

    Experts that are fused on disk too are named as engines want them, below the same parent.
    """
    modules = {path: m for path, m in model.named_modules() if isinstance(m, UnfusedExperts)}
    stand_ins: dict[str, torch.Tensor] = {}
    labels: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            own = _stand_ins(path, module, labels)
            stack.enter_context(_replaced(model, path, own))
            stand_ins.update(own)
        saved = _saved(model, stand_ins) if stand_ins else {}
    found = {}
    for path, module in modules.items():
        saved_path = _saved_path(path, known)
        for name, _ in module.named_parameters():
            found[f"{path}.{name}"] = f"{saved_path}.{name}"
    for name, tensor in saved.items():
        if tensor.numel() == 1:
            found[f"{labels[int(tensor)]}.weight"] = name
    return found


def _saved_path(path: str, known: dict[str, str]) -> str:
    """Return the path of a module on disk, from a parameter of a module beside it."""
    parent, leaf = _parent(path), path.rpartition(".")[2]
    for name, saved in known.items():
        inside = name[len(parent) :]
        if name.startswith(f"{parent}.") and saved.endswith(inside):
            return f"{saved[: -len(inside)]}.{leaf}"
    return path


def _stand_ins(
    path: str, module: UnfusedExperts, labels: dict[int, str]
) -> dict[str, torch.Tensor]:
    """Fused weights of the smallest shape; ``labels`` says which linear layer an element is of."""
    layout, parts = module.layout, ["up_proj", "down_proj"]
    if layout.gated:
        parts.insert(0, "gate_proj")
    start, count = len(labels), len(module)
    for number in range(count):
        for part in parts:
            labels[len(labels)] = f"{path}.{number}.{part}"
    numbers = start + torch.arange(count * len(parts)).reshape(count, len(parts), 1)
    first, down = numbers[:, :-1], numbers[:, -1:]
    if layout.transposed:
        first = first.transpose(1, 2)
    return {f"{path}.{layout.first}": first, f"{path}.{layout.down}": down}


@contextlib.contextmanager
def _replaced(model: nn.Module, path: str, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put a module with these parameters at ``path``: some conversions ask for their shapes."""
    shell = nn.Module()
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        shell.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    parent, leaf = model.get_submodule(_parent(path)), path.rpartition(".")[2]
    own = getattr(parent, leaf)
    setattr(parent, leaf, shell)
    try:
        yield
    finally:
        setattr(parent, leaf, own)


def _saved(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the tensors under the names that ``save_pretrained`` would give them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers before 5
        return _saved_before_5(model, tensors)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def _saved_before_5(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    patterns = getattr(model, "_checkpoint_conversion_mapping", {})
    return {_turned_back(name, patterns): tensor for name, tensor in tensors.items()}


def _turned_back(name: str, patterns: dict[str, str]) -> str:
    """Undo the first renaming of the load that applies; look-ahead groups carry no text."""
    for loaded, module_side in patterns.items():
        replacement = re.sub(r"\(.*\)", "", loaded.lstrip("^"))
        name, count = re.subn(module_side, replacement, name)
        if count:
            break
    return name

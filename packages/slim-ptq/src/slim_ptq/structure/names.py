"""Names of parameters in the checkpoint on disk, where they differ from those in the model.

transformers renames parameters while loading (``block_sparse_moe`` to ``mlp``, prefixes of
multimodal models) and turns the names back while saving.  This follows what saving would do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
    known.update(_expert_names(model))
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


def _expert_names(model: nn.Module) -> dict[str, str]:
    """Names of the parameters of unfused experts, found by saving numbered stand-ins."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, UnfusedExperts):
            continue
        entries = [
            (number, name)
            for number, expert in enumerate(module)
            for name, _ in expert.named_parameters()
        ]
        stand_ins = _stand_ins(module, path)
        saved = _saved(model, stand_ins)
        numbered = {int(t.flatten()[0]): name for name, t in saved.items() if t.numel() == 1}
        for number, name in entries:
            own = f"{path}.{number}.{name}"
            label = _label(module, number, name)
            found[own] = numbered.get(label, _renamed_like(own, path, stand_ins, saved))
    return found


def _label(module: UnfusedExperts, number: int, name: str) -> int:
    linear = name.partition(".")[0]
    part = {"gate_proj": 0, "up_proj": 1 if module.layout.gated else 0, "down_proj": 2}[linear]
    return 1 + 3 * number + part


def _stand_ins(module: UnfusedExperts, path: str) -> dict[str, torch.Tensor]:
    """Fused weights of the smallest shape whose elements say which expert and part they are."""
    count = len(module)
    parts = 2 if module.layout.gated else 1
    labels = 1 + 3 * torch.arange(count).reshape(count, 1, 1)
    first = labels + torch.arange(parts).reshape(1, parts, 1)
    down = labels + 2
    if module.layout.transposed:
        first = first.transpose(1, 2)
    return {f"{path}.{module.layout.first}": first, f"{path}.{module.layout.down}": down}


def _renamed_like(
    own: str, path: str, stand_ins: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]
) -> str:
    """Name an expert's parameter where the checkpoint holds fused ones: below their parent."""
    parents = {_parent(name) for name in saved}
    parent = parents.pop() if len(parents) == 1 and len(saved) == len(stand_ins) else path
    return parent + own[len(path) :]


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

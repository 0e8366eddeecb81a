"""The decoder blocks of a model, found by structure."""

from __future__ import annotations

from torch import nn

from slim_core.errors import StructureError
from slim_ptq.structure.linears import is_linear


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the decoder blocks, in order.

    A stack of blocks is an ``nn.ModuleList`` of modules that hold linear layers and that does not
    lie in another such list (as experts do).  Of several stacks (a multimodal model has one in
    each tower) the one nearest to the token embedding is taken, then the largest.

    Raises
    ------
    StructureError
        No list of blocks was found.
    """
    stacks = _stacks(model)
    if not stacks:
        raise StructureError(
            f"no decoder blocks found in {type(model).__name__}",
            hint="the blocks must be the items of an nn.ModuleList and hold linear layers",
        )
    embedding = _embedding_path(model)
    name = max(stacks, key=lambda stack: (_shared(stack, embedding), _size(stacks[stack])))
    prefix = f"{name}." if name else ""
    return tuple(f"{prefix}{index}" for index in range(len(stacks[name])))


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, nn.ModuleList) and len(module):
            items = [not is_linear(item) and _holds_linear(item) for item in module]
            if all(items):
                found[name] = module
    return found


def _holds_linear(module: nn.Module) -> bool:
    return any(is_linear(child) for child in module.modules())


def _embedding_path(model: nn.Module) -> list[str]:
    """Path of the token embedding: what the model says, else the embedding with most rows."""
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    getter = getattr(model, "get_input_embeddings", None)
    if callable(getter):
        try:
            declared = getter()
        except (NotImplementedError, AttributeError):  # remote code that does not define one
            declared = None
        if id(declared) in names:
            return names[id(declared)].split(".")
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        return []
    return names[id(max(tables, key=lambda table: table.num_embeddings))].split(".")


def _shared(stack: str, path: list[str]) -> int:
    """Count the leading parts of the dotted name that the two have in common."""
    count = 0
    for mine, other in zip(stack.split("."), path, strict=False):
        if mine != other:
            break
        count += 1
    return count


def _size(stack: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in stack.parameters())

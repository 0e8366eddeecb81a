"""What a checkpoint holds, from its headers and its configuration: input of the plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slim_core.checkpoint import Checkpoint
from slim_core.dtypes import FLOAT_NAMES, float_name
from slim_core.errors import CheckpointError, StructureError
from slim_core.groups import is_router
from slim_ptq.loading import empty_model
from slim_ptq.structure import checkpoint_names as names_of
from slim_ptq.structure import find_blocks, find_linears, unfuse_experts
from slim_ptq.structure.linears import is_conv1d

_IN_BLOCK = re.compile(r".*\.\d+\..*")
_NOT_LINEAR = re.compile(r".*(embed|norm|wte|wpe|conv)[^.]*")


@dataclass(frozen=True, slots=True)
class Inventory:
    """The linear layers of a checkpoint that can be quantized.

    Parameters
    ----------
    linears : dict
        Weight shape (out, in) by the name of the layer in the checkpoint.
    modules : dict
        Name of the layer in the model by its name in the checkpoint; empty without a model.
    transposed : frozenset of str
        Layers whose stored weight has shape (in, out).
    model_dtype : str
        ``float32``, ``float16`` or ``bfloat16``.
    model : torch.nn.Module, optional
        The model with its parameters on the meta device; None if only names were looked at.
    blocks : tuple of str
        Names of the decoder blocks in the model, in order.
    rename : callable
        From parameter names in the model to names in the checkpoint.
    """

    linears: dict[str, tuple[int, int]]
    model_dtype: str
    modules: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    model: Any = None
    blocks: tuple[str, ...] = ()
    rename: Callable[[str], str] = str


def take_inventory(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Inventory:
    """Find the linear layers of the decoder blocks of a model, without reading any weight.

    Raises
    ------
    CheckpointError
        The checkpoint is quantized already, or weights that the model needs are not in it.
    StructureError
        transformers cannot build the model, or it has no decoder blocks.
    """
    _refuse_quantized(checkpoint)
    dtype = model_dtype(checkpoint)
    model = empty_model(checkpoint, trust_remote_code=trust_remote_code)
    unfuse_experts(model)
    blocks = find_blocks(model)
    rename = names_of(model)
    linears: dict[str, tuple[int, int]] = {}
    modules: dict[str, str] = {}
    transposed: set[str] = set()
    for path, module in find_linears(model).items():
        if not path.startswith(tuple(f"{block}." for block in blocks)):
            continue
        name = rename(f"{path}.weight").removesuffix(".weight")
        stored = checkpoint.tensors.get(f"{name}.weight")
        if stored is None:
            raise CheckpointError(
                f"{checkpoint.path} has no tensor {name}.weight, which the model needs",
                hint=f"it has {len(checkpoint.tensors)} tensors, such as "
                + ", ".join(list(checkpoint.tensors)[:3]),
            )
        if len(stored.shape) != 2:
            raise CheckpointError(f"{name}.weight must be a matrix, not of shape {stored.shape}")
        rows, columns = stored.shape
        if is_conv1d(module):
            transposed.add(name)
            rows, columns = columns, rows
        linears[name] = (rows, columns)
        modules[name] = path
    return Inventory(linears, dtype, modules, frozenset(transposed), model, blocks, rename)


def transposed_names(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the layers whose float weight a model class keeps as (in, out).

    Only classes of transformers itself do; a model that it cannot build has none.
    """
    try:
        model = empty_model(checkpoint)
    except (CheckpointError, StructureError):
        return frozenset()
    rename = names_of(model)
    return frozenset(
        rename(f"{path}.weight").removesuffix(".weight")
        for path, module in find_linears(model).items()
        if is_conv1d(module)
    )


def inventory_by_names(checkpoint: Checkpoint) -> Inventory:
    """Find the linear layers by names and shapes alone, for models that transformers lacks.

    Taken are two-dimensional ``.weight`` tensors inside numbered blocks, but for routers,
    embeddings and norms.

    Raises
    ------
    StructureError
        No tensor looks like the weight of a linear layer.
    """
    _refuse_quantized(checkpoint)
    linears = {}
    for tensor, info in checkpoint.tensors.items():
        name = tensor.removesuffix(".weight")
        leaf = name.rpartition(".")[2]
        if (
            tensor != name
            and len(info.shape) == 2
            and _IN_BLOCK.fullmatch(name)
            and not _NOT_LINEAR.fullmatch(leaf)
            and not is_router(name)
        ):
            linears[name] = (info.shape[0], info.shape[1])
    if not linears:
        raise StructureError(f"no tensor of {checkpoint.path} looks like a linear layer in a block")
    return Inventory(linears, model_dtype(checkpoint))


def model_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that the configuration declares, or that most weights have."""
    config = checkpoint.config
    inner = config.get("text_config") or {}
    for source in (config, inner):
        declared = source.get("dtype") or source.get("torch_dtype")
        if isinstance(declared, str):
            return float_name(declared)
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        kind = np.dtype(info.dtype).name
        if kind in FLOAT_NAMES:
            sizes[kind] = sizes.get(kind, 0) + info.nbytes
    if not sizes:
        raise CheckpointError(f"{checkpoint.path} holds no floating-point weights")
    return max(sizes, key=lambda kind: sizes[kind])


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    described = list(checkpoint.path.glob("quant_model_description*.json"))
    if described or "quantization_config" in checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.path} is quantized already",
            hint="start from the float model, or turn it back with slim-ptq dequantize",
        )

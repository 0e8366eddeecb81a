"""Decomposed language models in the layout of Hugging Face: write, read, multiply out.

``config.json`` carries the rank table as ``quantization_config`` with the method ``slim_lowrank``.
Loaders that do not know that method say so (transformers) or refuse the model (vLLM).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from slim_core.checkpoint import Checkpoint, ShardWriter, copy_side_files, open_checkpoint
from slim_core.errors import CheckpointError
from slim_core.files import PathLike, staged_dir
from slim_lowrank.numpy_bridge import from_numpy, to_numpy
from slim_lowrank.surgery import apply_table
from slim_lowrank.table import LayerRanks, Table, from_json, to_json

if TYPE_CHECKING:
    from slim_lowrank.report import Report

METHOD = "slim_lowrank"
REPORT_FILE = "slim_lowrank_report.json"
SHARD_BYTES = 5 << 30


def save_pretrained(
    model: nn.Module,
    table: Mapping[str, LayerRanks],
    source: PathLike,
    out: PathLike,
    *,
    report: Report | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model whose original is a local directory of transformers.

    Parameters
    ----------
    model : Module
        The decomposed model, or a dense one with an empty ``table``.
    table : dict of LayerRanks
        What was decomposed.
    source : path
        Directory of the original: configuration, tokenizer and other side files are taken over.
    out : path
        New directory; complete or not there at all.
    report : Report, optional
        Written beside the model.
    overwrite : bool
        Replace what is in ``out``.
    max_shard_bytes : int
        Size at which a new weight file begins.

    Raises
    ------
    OutputExistsError
        ``out`` is not empty.
    CheckpointError, FileSecurityError
        ``source`` is no checkpoint, or unsafe.
    """
    origin = open_checkpoint(source)
    changes = {"quantization_config": {"quant_method": METHOD, **to_json(table.values())}}
    state = own_tensors(model)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    limit = max_shard_bytes if total > max_shard_bytes else None
    with staged_dir(out, overwrite=overwrite) as staging:
        copy_side_files(origin, staging, changes if table else None)
        with ShardWriter(staging, "model", max_shard_bytes=limit) as writer:
            for name, tensor in state.items():
                writer.add(name, to_numpy(tensor))
        if report is not None:
            report.save(staging / REPORT_FILE)
    return Path(out)


def load_pretrained(path: PathLike, *, device: str | torch.device = "cpu") -> Any:
    """Read a model that :func:`save_pretrained` wrote, or any dense causal language model.

    Parameters
    ----------
    path : path
        Local directory.
    device : str or device
        Where the weights go, one after the other.

    Returns
    -------
    PreTrainedModel
        In eval mode, dtypes as stored.

    Raises
    ------
    CheckpointError
        Weights are missing, left over or of another shape, naming the first.
    """
    checkpoint = open_checkpoint(path)
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    if read_table(checkpoint) is None:
        dense: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, local_files_only=True, dtype="auto"
        )
        return dense.to(device).eval()
    del config.quantization_config
    # Parameters on meta, buffers real: those not stored (rotary frequencies) are computed here.
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.tie_weights()
    model = apply_table(model, read_table(checkpoint) or {})
    assign(model, checkpoint, torch.device(device))
    return model.to(device).eval()


def read_table(checkpoint: Checkpoint) -> Table | None:
    """Return the rank table of a checkpoint, None if it is dense."""
    entry = checkpoint.config.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        return None
    return from_json(entry)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, shared ones under their first name only."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def assign(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Set every tensor of a model from a checkpoint, shared ones in all their places at once."""
    wanted = own_tensors(model)
    extra = checkpoint.tensors.keys() - wanted.keys()
    for kind, names in (
        ("lacks", wanted.keys() - checkpoint.tensors.keys()),
        ("has no place for", extra),
    ):
        if names:
            raise CheckpointError(f"{checkpoint.path}: the model {kind} {sorted(names)[0]!r}")
    places = _places(model)
    for name, tensor in wanted.items():
        value = from_numpy(checkpoint.load(name)).to(device)
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name!r} has the shape {tuple(value.shape)}, the model "
                f"wants {tuple(tensor.shape)}"
            )
        owners = places[name]
        is_parameter = owners[0][1] in owners[0][0]._parameters
        new = (
            nn.Parameter(value, requires_grad=tensor.dtype.is_floating_point)
            if is_parameter
            else value
        )
        for owner, attribute in owners:
            setattr(owner, attribute, new)


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return every (module, attribute) that holds a tensor, by the first name of the tensor."""
    first: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(first.setdefault(id(tensor), name), []).append(
                    (module, attribute)
                )
    return places

"""Opening models to run them: float ones, and quantized ones as fake-quant models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slim_core.checkpoint import Checkpoint, open_checkpoint
from slim_core.errors import CheckpointError, StructureError
from slim_core.files import PathLike, as_path
from slim_core.quantized import QuantizedCheckpoint, is_quantized
from slim_core.tensor_parallel import TYPE, slice_name
from slim_core.validate import check_choice
from slim_ptq.attention.restore import restore_attention
from slim_ptq.devices import torch_device
from slim_ptq.loading import empty_model, load_parameters, model_factory
from slim_ptq.modules import FakeQuantLinear, as_torch, on_device
from slim_ptq.structure import checkpoint_names, find_linears, is_linear, unfuse_experts
from slim_ptq.structure.norms import is_norm_like
from slim_ptq.tensor_parallel import restored
from slim_ptq.tensors import from_numpy
from slim_ptq.transforms import add_bias

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def load_model(
    path: PathLike,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return the model of a directory, ready to run and to generate text.

    A quantized directory gives the float model with its quantized layers replaced by
    :class:`~slim_ptq.modules.FakeQuantLinear`, which compute what an engine computes.

    Parameters
    ----------
    path : path
    device : str
    dtype : {"float32", "float64"}, optional
        Of weights that are not quantized and of activations; float32 on the CPU and the dtype of
        the model elsewhere if None.  In float64 an activation next to the middle between two codes
        does not depend on the order of sums, so that results can be compared with those of another
        framework.  What the code of the model casts to float32 (norms and rotary angles in
        transformers) stays there.
    trust_remote_code : bool
        Run model code that lies in the directory.

    Raises
    ------
    InvalidValueError, DeviceError
        An argument is wrong.
    CheckpointError, StructureError
        The directory holds no model that transformers can build, or its tensors do not fit.
    """
    root = as_path("path", path)
    place = torch_device(device)
    wanted = None if dtype is None else _DTYPES[check_choice("dtype", dtype, _DTYPES)]
    if wanted is None and place.type == "cpu":
        wanted = torch.float32
    if is_quantized(root):
        return _load_quantized(root, place, wanted, trust_remote_code)
    return _load_float(root, place, wanted, trust_remote_code)


def _load_float(
    root: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    try:
        model = model_factory(open_checkpoint(root).config).from_pretrained(
            root,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load {root}: {error}") from error
    return model.to(device).eval()


def _load_quantized(
    root: Path, device: torch.device, wanted: torch.dtype | None, trust_remote_code: bool
) -> Any:
    stored = QuantizedCheckpoint(root)
    model = empty_model(stored.checkpoint, trust_remote_code=trust_remote_code)
    unfuse_experts(model)
    rename = checkpoint_names(model)
    dtype: torch.dtype = wanted or getattr(torch, stored.model_dtype)
    left = dict(stored.layers) | dict.fromkeys(stored.slices, TYPE)
    linears: dict[str, str] = {}
    for path in find_linears(model):
        name = rename(f"{path}.weight").removesuffix(".weight")
        linears[name] = path
        if left.pop(name, None) is None:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _restored(stored, name, device, dtype))
        for index in range(stored.slices.get(name, 0)):
            del left[slice_name(name, index)]
    if left:
        raise StructureError(f"the model has no layer {next(iter(left))}, which is described")
    _add_biases(model, stored, rename, device, dtype)
    tied = _tied_names(model, stored.checkpoint, rename)
    for path, module in model.named_modules():
        if path not in tied and not isinstance(module, FakeQuantLinear):
            load_parameters(
                module,
                path,
                stored.checkpoint,
                rename,
                device=device,
                dtype=dtype,
                recurse=False,
            )
    model.tie_weights()
    model.config.use_cache = True
    model.eval()
    restore_attention(model, stored.description, stored.checkpoint.load, linears, rename)
    return model


def _restored(
    stored: QuantizedCheckpoint, name: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Return what computes a quantized layer."""
    if name in stored.slices:
        return restored(stored.sliced(name), device, dtype)
    return FakeQuantLinear(on_device(as_torch(stored.layer(name)), device), dtype)


def _tied_names(model: Any, checkpoint: Checkpoint, rename: Callable[[str], str]) -> set[str]:
    """Return the modules whose only parameter is that of another module, and not stored.

    The configuration does not tell: that of a model with images may say tied where the text model
    in it is not.
    """
    head = model.get_output_embeddings()
    return {
        path
        for path, module in model.named_modules()
        if module is head and rename(f"{path}.weight") not in checkpoint.tensors
    }


def _add_biases(
    model: Any,
    stored: QuantizedCheckpoint,
    rename: Callable[[str], str],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give norms and float layers the biases of outlier suppression that their class lacks."""
    for path, module in model.named_modules():
        if not is_linear(module) and not is_norm_like(module):
            continue
        name = rename(f"{path}.weight").removesuffix("weight") + "bias"
        if getattr(module, "bias", None) is None and name in stored.checkpoint.tensors:
            values = from_numpy(stored.checkpoint.load(name))
            if values.any():
                add_bias(module, values.to(device, dtype))

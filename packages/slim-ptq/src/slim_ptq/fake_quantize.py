"""``FakeQuantizeCalibrator``: a saved checkpoint opened again on a float model in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from slim_core.dtypes import float_name
from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.layers import QuantizedLinear
from slim_core.quantized import format_of, scheme_of
from slim_core.tensor_parallel import count_slices, read_sliced, slice_name
from slim_core.validate import check_choice, check_int, check_type
from slim_ptq.attention.restore import restore_attention
from slim_ptq.config_rules import DEVICE_TYPES
from slim_ptq.devices import torch_device
from slim_ptq.modules import FakeQuantLinear, as_torch, on_device
from slim_ptq.offload import keep_like, place, resident
from slim_ptq.structure import checkpoint_names, find_linears, unfuse_experts
from slim_ptq.tensor_parallel import restored
from slim_ptq.tensors import to_numpy


class FakeQuantizeCalibrator:
    """Puts the quantized layers of a saved checkpoint into a float model.

    The type of each layer is that of its own description entry, so mixed checkpoints work.

    Parameters
    ----------
    model : torch.nn.Module
        The float model that was quantized.
    dev_id : int or None
        Index of the device; ignored on cpu.
    dev_type : str
        cpu, npu or gpu.
    description : dict
        Content of the description file.
    safetensor : dict of str to torch.Tensor
        Tensors of the checkpoint by name.

    Attributes
    ----------
    model : torch.nn.Module
        The same model, now computing what the deployed model computes.

    Raises
    ------
    InvalidTypeError, InvalidValueError, FormatError
        An argument is wrong, a layer is not described, or its tensors do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        dev_id: int | None,
        dev_type: str,
        description: dict[str, str],
        safetensor: dict[str, torch.Tensor],
    ) -> None:
        self.model: Any = check_type("model", model, nn.Module)
        check_type("description", description, dict)
        for name, tensor in check_type("safetensor", safetensor, dict).items():
            if not isinstance(tensor, torch.Tensor):
                raise InvalidTypeError(
                    f"safetensor[{name!r}] must be torch.Tensor, not {type(tensor).__name__}"
                )
        kind = check_choice("dev_type", dev_type, DEVICE_TYPES)
        if dev_id is not None:
            check_int("dev_id", dev_id, low=0)
        place_name = "cuda" if kind == "gpu" else kind
        index = "" if kind == "cpu" or dev_id is None else f":{dev_id}"
        device = torch_device(f"{place_name}{index}")

        self.model.eval()
        place(self.model, device)
        unfuse_experts(self.model)
        rename = checkpoint_names(self.model)
        linears = {
            path: rename(f"{path}.weight").removesuffix(".weight")
            for path in find_linears(self.model)
        }
        lost = [name for name in linears.values() if f"{name}.weight" not in description]
        if lost:
            raise InvalidValueError(f"description has no entry {lost[0]}.weight")
        layers: dict[str, dict[str, Any]] = {}
        for key, tensor in safetensor.items():
            layer, _, local = key.rpartition(".")
            layers.setdefault(layer, {})[local] = to_numpy(tensor)
        form = format_of(description)

        def decoded(name: str, dtype: torch.dtype) -> QuantizedLinear:
            found = layers.get(name, {})
            scheme = scheme_of(name, description[f"{name}.weight"], found)
            return form.decode(name, scheme, found, _stored_dtype(found, dtype))

        slices = count_slices(layers)
        for path, name in linears.items():
            dtype = self.model.get_submodule(path).get_parameter("weight").dtype
            made: nn.Module
            if name in slices:
                parts = tuple(decoded(slice_name(name, i), dtype) for i in range(slices[name]))
                stored = read_sliced(name, parts, safetensor, lambda n: to_numpy(safetensor[n]))
                made = restored(stored, device, dtype)
            elif description[f"{name}.weight"] == "FLOAT":
                continue
            else:
                made = FakeQuantLinear(on_device(as_torch(decoded(name, dtype)), device), dtype)
            self._put(path, made)
        self._load_floats(rename, description, safetensor)
        restore_attention(
            self.model,
            description,
            lambda name: to_numpy(safetensor[name]),
            {name: path for path, name in linears.items()},
            rename,
        )

    def _put(self, path: str, module: nn.Module) -> None:
        """Put a module in the place of a layer, offloaded as it was."""
        linear = self.model.get_submodule(path)
        for local, part in module.named_modules():
            if isinstance(part, FakeQuantLinear):
                keep_like(part, linear, ".".join(["codes", *filter(None, [local])]) + ".")
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    def _load_floats(
        self, rename: Any, description: dict[str, str], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Take over float tensors: outlier suppression has changed norms and float layers."""
        for path, module in self.model.named_modules():
            own = [local for local, _ in module.named_parameters(prefix=path, recurse=False)]
            names = {local: rename(local) for local in own}
            if not any(description.get(n) == "FLOAT" and n in tensors for n in names.values()):
                continue
            with resident(module, recurse=False, changed=True), torch.no_grad():
                for local, parameter in module.named_parameters(prefix=path, recurse=False):
                    if description.get(names[local]) == "FLOAT" and names[local] in tensors:
                        parameter.copy_(tensors[names[local]])


def _stored_dtype(tensors: dict[str, Any], actual: torch.dtype) -> str:
    """Return the dtype of the model that was saved, which may be open in another one here."""
    deq_scale = tensors.get("deq_scale")
    if deq_scale is None:
        return float_name(actual)
    if deq_scale.dtype == np.float32:
        return "bfloat16"
    return "float32" if actual == torch.bfloat16 else float_name(actual)

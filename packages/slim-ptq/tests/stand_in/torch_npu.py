"""A stand-in for ``torch_npu``: devices of their own whose memory and kernels are those of the CPU.

What it proves: every tensor that meets one on a device is on the same one, what leaves for numpy, a
file or another process is brought back first, and the results are those of the CPU.  What it
cannot: which operators a real device has, how it rounds, and how fast it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICES = 4
_MAY_MIX = ("_to_copy", "copy_", "index", "index_put", "index_put_")  # as real devices allow it


class DeviceTensor(torch.Tensor):
    """A tensor that says that it is on a device, around one that is on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("npu", index),
        )
        made.inner = inner
        return made

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, DeviceTensor):
            raise RuntimeError("the data of a tensor on the device must be there")
        self.inner = value.inner

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor on a device is on its way to another process or a file")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        target = torch.device(kwargs.get("device") or "npu")
        if "device" in kwargs and target.type == "npu":
            kwargs["device"] = torch.device("cpu")
        wrapped = {}  # results that are arguments stay the objects that they are
        places: list[int] = []

        def unwrap(value: Any) -> Any:
            if isinstance(value, DeviceTensor):
                wrapped[id(value.inner)] = value
                places.append(value.device.index)
                return value.inner
            if isinstance(value, torch.Tensor) and value.ndim and name not in _MAY_MIX:
                raise RuntimeError(f"{func} got a tensor on a device and one on the CPU")
            return value

        def wrap(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor):
                known = wrapped.get(id(value))
                return DeviceTensor(value, place) if known is None else known
            return value

        args, kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        if len(set(places)) > 1 and name not in _MAY_MIX:
            raise RuntimeError(f"{func} got tensors on devices {sorted(set(places))}")
        place = places[0] if target.index is None else target.index
        found = func(*args, **kwargs)
        if target.type != "npu":
            return found
        if name == "copy_" and id(args[0]) not in wrapped:
            return args[0]  # on the CPU
        return tree_map(wrap, found)


class _Module:
    """What torch and its users ask ``torch.npu``."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def _lazy_init() -> None:
        return None

    @staticmethod
    def device_count() -> int:
        return DEVICES

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        return None

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> DeviceTensor:
    inner = torch.empty(size, dtype=dtype or torch.get_default_dtype())
    return DeviceTensor(inner, torch.device(device or "npu").index or 0)


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> DeviceTensor:
    inner = torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype())
    return DeviceTensor(inner, torch.device(device or "npu").index or 0)


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    """Copy for ``torch.tensor(..., device=...)``, which goes past the class."""
    to, of = (part.inner if isinstance(part, DeviceTensor) else part for part in (target, source))
    to.copy_(of)
    return target


_setup_privateuseone_for_python_backend("npu", _Module())
_library = torch.library.Library("aten", "IMPL")
for _name, _kernel in {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy_from,
}.items():
    _library.impl(_name, _kernel, "PrivateUse1")
dist.Backend.register_backend("hccl", dist.ProcessGroupGloo, devices=["npu"])

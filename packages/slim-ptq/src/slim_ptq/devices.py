"""From the names of a device and of a dtype to those of torch, checked."""

from __future__ import annotations

import importlib.util

import torch

from slim_core.dtypes import FLOAT_NAMES
from slim_core.errors import DeviceError, InvalidValueError, MissingDependencyError
from slim_core.validate import check_choice

KINDS = ("cpu", "npu", "cuda")
AUTO = "auto"
DTYPES = (AUTO, *FLOAT_NAMES)  # in which blocks may run


def torch_device(name: str) -> torch.device:
    """Return the device of a name such as ``cpu``, ``npu``, ``npu:1`` or ``cuda:0``.

    ``torch_npu`` is imported only when an NPU is asked for.

    Raises
    ------
    InvalidValueError
        The kind of device is unknown.
    MissingDependencyError
        An NPU is asked for and ``torch_npu`` is not installed.
    DeviceError
        There is no such device.
    """
    kind, _, index = name.partition(":")
    check_choice("device", kind, KINDS)
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "npu":
        _import_torch_npu()
    backend = getattr(torch, kind)
    if not backend.is_available():
        raise DeviceError(f"no {kind} device is available", hint="use --device cpu")
    count = backend.device_count()
    if index and (not index.isdecimal() or int(index) >= count):
        raise DeviceError(f"{kind} device {index!r} does not exist, there are {count}")
    return torch.device(name)


def compute_dtype(name: str, device: torch.device, model_dtype: str) -> torch.dtype:
    """Return the dtype in which the blocks of a model run.

    Parameters
    ----------
    name : str
        One of :data:`DTYPES`: ``auto`` is float32 on the CPU, and the dtype of the model on other
        devices.
    model_dtype : str
        Name of the dtype of the model.

    Raises
    ------
    InvalidValueError
        Weights would be rounded to another dtype before they are quantized.
    """
    if name == AUTO:
        name = "float32" if device.type == "cpu" else model_dtype
    if name not in ("float32", model_dtype):
        allowed = " or ".join(dict.fromkeys(("float32", model_dtype)))
        raise InvalidValueError(
            f"dtype must be {allowed} for a model in {model_dtype}, not {name}",
            hint="its weights would be rounded before they are quantized",
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _import_torch_npu() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        raise MissingDependencyError(
            "device npu needs the package torch_npu, which is not installed",
            hint="install the torch_npu release that fits this torch, or use cpu",
        )
    import torch_npu  # noqa: F401  (registers the npu device)

"""From the name of a device to the torch device, checked."""

from __future__ import annotations

import importlib.util

import torch

from slim_core.errors import DeviceError, MissingDependencyError
from slim_core.validate import check_choice

KINDS = ("cpu", "npu", "cuda")


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


def _import_torch_npu() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        raise MissingDependencyError(
            "device npu needs the package torch_npu, which is not installed",
            hint="install the torch_npu release that fits this torch, or use cpu",
        )
    import torch_npu  # noqa: F401  (registers the npu device)

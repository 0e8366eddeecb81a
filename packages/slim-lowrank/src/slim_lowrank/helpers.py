"""Helpers that go with the compatible face: counting, loading and protected writing."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn

from slim_core.errors import FileSecurityError, InvalidTypeError
from slim_core.files import MODE_SHARED, PathLike, atomic_write, check_input_file


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameter values: frozen ones too, shared ones once, no buffers.

    Raises
    ------
    InvalidTypeError
        ``network`` is not a ``torch.nn.Module``.
    """
    if not isinstance(network, nn.Module):
        raise InvalidTypeError(f"network must be a torch.nn.Module, not {type(network).__name__}")
    return sum(parameter.numel() for parameter in network.parameters())


def safe_torch_load(path: PathLike, **kwargs: Any) -> Any:
    """Load a file of ``torch.save`` without ever running code from it.

    Parameters
    ----------
    path : path
        A regular file that others cannot write.
    **kwargs
        As for ``torch.load``, for example ``map_location``; ``weights_only`` must not be False.

    Raises
    ------
    FileNotFoundError, FileSecurityError
        The path is unsafe, ``weights_only=False`` was asked for, or the file holds more than
        tensors and plain containers.  There is no prompt and no way around.
    """
    file = check_input_file(path)
    if kwargs.pop("weights_only", True) is not True:
        raise FileSecurityError("safe_torch_load never runs code: weights_only must be True")
    try:
        return torch.load(file, weights_only=True, **kwargs)
    except pickle.UnpicklingError as error:
        raise FileSecurityError(
            f"{file} holds more than tensors and plain containers: {error}".splitlines()[0],
            hint="save a state_dict, or use safetensors",
        ) from error


def safe_torch_save(value: Any, path: PathLike, mode: int = MODE_SHARED) -> None:
    """Save with ``torch.save``, atomically, with a mode set on the file (default 0640).

    This stands in for ``with SafeWriteUmask(): torch.save(value, path)``: the umask belongs to the
    whole process, other threads included, so it is left alone.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path, mode) as stream:
        stream.write(buffer.getbuffer())

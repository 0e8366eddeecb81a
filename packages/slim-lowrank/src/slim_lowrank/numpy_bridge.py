"""Tensors to numpy and back without a change of dtype, bfloat16 and float8 included."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CARRIERS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return a host copy or view of a tensor with the same bits."""
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype not in _CARRIERS:
        return np.asarray(tensor.numpy())
    carrier, dtype = _CARRIERS[tensor.dtype]
    return np.asarray(tensor.view(carrier).numpy().view(dtype))


def from_numpy(array: NDArray[Any]) -> Tensor:
    """Return a tensor with the same bits; the inverse of :func:`to_numpy`."""
    for dtype, (carrier, numpy_dtype) in _CARRIERS.items():
        if array.dtype == numpy_dtype:
            bits = array.view(np.int16 if carrier == torch.int16 else np.uint8)
            return torch.from_numpy(np.array(bits)).view(dtype)
    return torch.from_numpy(np.array(array))

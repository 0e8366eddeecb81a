"""Between numpy and torch, bfloat16 included, without copying where that is possible."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

_EXOTIC = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, torch.float8_e5m2),
}
_BY_TORCH = {dtype: (carrier, exotic) for exotic, (carrier, dtype) in _EXOTIC.items()}


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares the memory of the array."""
    if array.dtype in _EXOTIC:
        carrier, dtype = _EXOTIC[array.dtype]
        return torch.from_numpy(array.view(carrier)).view(dtype)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return an array of the tensor, sharing its memory if it is on the CPU and contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _BY_TORCH:
        carrier, exotic = _BY_TORCH[tensor.dtype]
        torch_carrier = torch.int16 if carrier is np.int16 else torch.uint8
        return tensor.view(torch_carrier).numpy().view(exotic)
    array: np.ndarray = tensor.numpy()
    return array

"""The dtype of a model in memory."""

from __future__ import annotations

import torch
from torch import nn

from slim_core.dtypes import FLOAT_NAMES
from slim_core.errors import InvalidTypeError
from slim_core.logging import get_logger

_log = get_logger("ptq")


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that the configuration declares, else that of the parameters.

    It decides how scales are stored.

    Raises
    ------
    InvalidTypeError
        It is none of float32, float16 and bfloat16.
    """
    config = getattr(model, "config", None)
    declared = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    actual = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if isinstance(declared, str):
        declared = getattr(torch, declared, None)
    dtype = declared if isinstance(declared, torch.dtype) else actual
    if dtype is None or dtype not in {getattr(torch, name) for name in FLOAT_NAMES}:
        raise InvalidTypeError(f"the model must be one of {', '.join(FLOAT_NAMES)}, not {dtype}")
    if actual is not None and actual != dtype:
        _log.warning("the configuration says %s, the parameters are %s", dtype, actual)
    return dtype

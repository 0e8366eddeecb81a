"""Which modules are linear layers, and one view of their weights: ``[out, in]``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from slim_core.errors import InvalidTypeError


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether the module is the ``Conv1D`` of GPT-2: a linear with weight ``[in, out]``."""
    pytorch_utils: Any = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Tell whether the module computes ``x @ W.T + b``: ``nn.Linear``, a subclass, or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Return the weight as ``[out, in]``, sharing memory with the layer.

    Raises
    ------
    InvalidTypeError
        ``linear`` is not a linear layer.
    """
    if not is_linear(linear):
        raise InvalidTypeError(f"linear must be a linear layer, not {type(linear).__name__}")
    weight: torch.Tensor = linear.get_parameter("weight").detach()
    return weight.T if is_conv1d(linear) else weight


def bias_of(linear: nn.Module) -> torch.Tensor | None:
    """Return the bias ``[out]`` of a linear layer, or None if it has none."""
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.detach()


def as_linear(conv1d: nn.Module) -> nn.Linear:
    """Return an ``nn.Linear`` that computes the same as a linear layer of any kind.

    Memory is shared with the layer; the weight of one made from a Conv1D is a transposed view.
    """
    weight = weight_of(conv1d)
    bias = bias_of(conv1d)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.train(conv1d.training)

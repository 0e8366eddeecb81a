"""Biases for norms and linear layers that the class of the model gives none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slim_ptq.structure import is_linear

_ADDED = "_slim_added_bias"


def add_bias(module: nn.Module, values: torch.Tensor) -> None:
    """Give a norm or a linear layer without a bias one that it adds to its output.

    The parameter is called ``bias``.  Copies of the module keep it; a model that is built from the
    class again does not have it.

    Parameters
    ----------
    module : nn.Module
        Norm or linear layer; a norm gets a forward hook unless its class knows a bias.
    values : torch.Tensor
        ``[out]``.
    """
    knows = is_linear(module) or "bias" in module._parameters
    parameter = nn.Parameter(values.detach().clone(), requires_grad=False)
    module.register_parameter("bias", parameter)
    setattr(module, _ADDED, True)
    if not knows:
        module.register_forward_hook(_plus_bias)


def has_added_bias(module: nn.Module) -> bool:
    """Tell whether the bias of a module came from :func:`add_bias`."""
    return hasattr(module, _ADDED)


def added_biases(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules with a bias from :func:`add_bias`."""
    return tuple(name for name, module in model.named_modules() if has_added_bias(module))


def _plus_bias(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    bias: torch.Tensor = module.bias
    return out + bias

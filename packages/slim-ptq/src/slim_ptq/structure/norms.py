"""Which modules are norms, and how a norm uses its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from slim_ptq.structure.linears import is_linear
from slim_ptq.structure.links import NormForm

TOKENS = 8
TOLERANCE = 1e-4


def is_norm_like(module: nn.Module) -> bool:
    """Tell whether the module has one weight ``[C]``, at most a bias beside it, and no children."""
    if is_linear(module) or isinstance(module, nn.Embedding) or list(module.children()):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    if "weight" not in parameters or set(parameters) - {"weight", "bias"}:
        return False
    return all(p.ndim == 1 and p.shape == module.weight.shape for p in parameters.values())


def norm_form(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormForm | None:
    """Find by trial how the module's output depends on its weight.

    Parameters
    ----------
    module : nn.Module
        A module for which :func:`is_norm_like` holds.
    args, kwargs
        What it was called with.

    Returns
    -------
    NormForm or None
        The form for which dividing the weight by a scale divides the output by it; None when
        neither does.
    """
    parameters = {n: p.detach().double() for n, p in module.named_parameters()}
    call = tuple(_short(value) for value in args), {k: _short(v) for k, v in kwargs.items()}
    weight = parameters["weight"]
    generator = torch.Generator().manual_seed(0)
    scale = 2.0 ** torch.randint(1, 4, weight.shape, generator=generator)
    scale = scale.to(weight.device, torch.float64)
    divided = {name: value / scale for name, value in parameters.items()}
    expected = functional_call(module, parameters, *call) / scale
    for form, changed in (
        (NormForm.PLAIN, weight / scale),
        (NormForm.ONE_PLUS, (1 + weight) / scale - 1),
    ):
        found = functional_call(module, {**divided, "weight": changed}, *call)
        error = float((found - expected).abs().max())
        if error <= TOLERANCE * float(expected.abs().max()):
            return form
    return None


def _short(value: Any) -> Any:
    """Return the first tokens of a float tensor in double precision; other values as they are."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach()[..., :TOKENS, :].double() if value.ndim > 1 else value.double()

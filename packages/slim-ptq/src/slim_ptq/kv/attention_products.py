"""Seeing the keys and values that attention is computed from, whatever code computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Found = Callable[[torch.Tensor, torch.Tensor], None]

# (index of the left operand); the right one follows it
_PRODUCTS = {
    torch.matmul: 0,
    torch.Tensor.matmul: 0,
    torch.Tensor.__matmul__: 0,
    torch.bmm: 0,
    torch.Tensor.bmm: 0,
    torch.baddbmm: 1,
    torch.Tensor.baddbmm: 1,
    torch.einsum: 1,
}
_SOFTMAX = {
    functional.softmax,
    torch.softmax,
    torch.Tensor.softmax,
}


class AttentionProducts(TorchFunctionMode):
    """Calls back with the key and value tensors of every attention that is computed inside it.

    Attention is ``scaled_dot_product_attention``, or a product of two activations, a softmax that
    depends on it, and a product of that with a third activation.  Gradients must be enabled, and
    exactly the activations must require them.

    Parameters
    ----------
    found : callable
        Takes the keys and the values as they enter the products.
    """

    def __init__(self, found: Found) -> None:
        super().__init__()
        self._found = found
        self._scores: list[tuple[torch.Tensor, torch.Tensor]] = []  # product, its right operand
        self._weights: list[tuple[torch.Tensor, torch.Tensor]] = []  # softmax of it, the same

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the function and look at its operands."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self._found(named["key"], named["value"])
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _PRODUCTS:
            operands = _operands(func, args, kwargs)
            if len(operands) == 2 and all(operand.requires_grad for operand in operands):
                self._product(operands[0], operands[1], out)
        elif func in _SOFTMAX and args[0].requires_grad:
            self._weights += [(out, key) for score, key in self._scores if _depends(args[0], score)]
        return out

    def _product(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        for weights, key in self._weights:
            if _depends(left, weights):
                self._found(key, right)
                self._scores.clear()
                self._weights.clear()
                return
        self._scores.append((out, right))


def _operands(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the left and right operand of a product."""
    rest = [*args[_PRODUCTS[func] :], *kwargs.values()]
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):  # einsum(equation, [left, right])
        rest = list(rest[0])
    return [value for value in rest if isinstance(value, torch.Tensor)][:2]


def _depends(value: torch.Tensor, source: torch.Tensor) -> bool:
    (gradient,) = torch.autograd.grad(
        value, source, torch.ones_like(value), retain_graph=True, allow_unused=True
    )
    return gradient is not None

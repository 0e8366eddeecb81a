"""Round to nearest on the grid of the extreme weights: the base line, and enough for 8 bits."""

from __future__ import annotations

import torch

from slim_core.numerics import check_finite, dequantize_weight, quantize_weight, weight_params
from slim_core.scheme import TensorScheme

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_minmax(name: str, weight: torch.Tensor, scheme: TensorScheme) -> Parts:
    """Quantize a weight.

    Parameters
    ----------
    name : str
        Of the layer, for messages.
    weight : torch.Tensor, floating point, shape (out, in)

    Returns
    -------
    codes : int8, shape (out, in)
    scale, offset : float32
        Shapes of :func:`slim_core.numerics.weight_params`.

    Raises
    ------
    NumericalError
        The weight has NaN or infinite elements.
    FormatError
        The group size does not divide the input channels.
    """
    values = weight.detach().float()
    check_finite(name, "weight", values)
    scale, offset = weight_params(values, scheme)
    return quantize_weight(values, scale, offset, scheme), scale, offset


def relative_error(weight: torch.Tensor, parts: Parts) -> float:
    """Return ``||W - W_q|| / ||W||`` (Frobenius), 0 for a weight of zeros."""
    values = weight.detach().float()
    norm = float(torch.linalg.vector_norm(values))
    error = float(torch.linalg.vector_norm(dequantize_weight(*parts).sub_(values)))
    return error / norm if norm else 0.0

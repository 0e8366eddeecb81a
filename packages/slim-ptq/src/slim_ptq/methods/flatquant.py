"""FlatQuant: learn transforms of the inputs that make weights and activations flat.

Sun et al., arXiv:2410.09426.  The transforms of a decoder block are trained together
(:mod:`slim_ptq.flatquant`); this is the method by its name, and what becomes of one weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch

from slim_core.numerics import EPS, quantize_weight, weight_params
from slim_core.scheme import QuantScheme, ScaleKind, TensorScheme, Variant
from slim_core.validate import check_float, check_int
from slim_ptq.methods.base import LayerInputs, Needs, Parts
from slim_ptq.methods.choices import check_enum, finite_weight
from slim_ptq.methods.gptq import GPTQ
from slim_ptq.methods.learned import LearnedTransform
from slim_ptq.methods.minmax import MinMax


class Rounding(str, Enum):
    """How the transformed weight becomes codes."""

    NEAREST = "nearest"  # on the grid of the learned clip ratios
    GPTQ = "gptq"  # on a grid of its own, for the transformed inputs


@dataclass(frozen=True)
class FlatQuant:
    """Train Kronecker-factored transforms, channel scales and clip ratios block by block.

    Parameters
    ----------
    epochs : int
        Passes over the calibration data, in [1, 1000]; fewer when the loss no longer falls.
    lr : float
        Learning rate of AdamW, in (0, 1]; ten times that for the clip ratios.
    alpha : float
        Share of the activation in the channel scales to begin with, in [0, 1].
    rounding : Rounding
    seed : int
        Of the rotations to begin with.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A parameter is out of its range.
    """

    name: ClassVar[str] = "flatquant"

    epochs: int = 15
    lr: float = 5e-3
    alpha: float = 0.3
    rounding: Rounding = Rounding.NEAREST
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("epochs", self.epochs, low=1, high=1000)
        object.__setattr__(self, "lr", check_float("lr", self.lr, low=1e-8, high=1))
        object.__setattr__(self, "alpha", check_float("alpha", self.alpha, low=0, high=1))
        object.__setattr__(self, "rounding", check_enum("rounding", self.rounding, Rounding))
        check_int("seed", self.seed, low=0)

    @property
    def needs(self) -> Needs:
        """The block of the layer, and with GPTQ the second moments of its inputs."""
        return Needs.BLOCK | (Needs.HESSIAN if self.rounding is Rounding.GPTQ else Needs.NONE)

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why a scheme has no place for transforms, None if it has."""
        if scheme.variant is Variant.FLATQUANT:
            return None
        return "only the schemes with flatquant in their names transform inputs"

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight (:meth:`slim_ptq.methods.base.WeightMethod.quantize`).

        A layer of which nothing was learned, because its block never ran it, is rounded to nearest
        and its transforms are identities.
        """
        learned = None if inputs is None else inputs.learned
        if inputs is None or not isinstance(learned, LearnedTransform):
            return MinMax().quantize(name, weight, scheme)
        values = finite_weight(name, weight)
        values = learned.weight(values)
        if inputs.hessian is not None:
            hessian = learned.hessian(inputs.hessian)
            seen = LayerInputs(inputs.count, hessian, hessian.diagonal())
            parts = GPTQ().quantize(name, values, scheme, seen)
        else:
            parts = _clipped(values, scheme, learned)
        note = (
            f"block error {learned.loss_before:.2e} -> {learned.loss_after:.2e} "
            f"in {learned.epochs} epochs"
        )
        return replace(parts, extras=learned.extras(), notes=(*parts.notes, note))


def _clipped(weight: torch.Tensor, scheme: TensorScheme, learned: LearnedTransform) -> Parts:
    if scheme.scales is ScaleKind.E8M0:
        scale, offset = weight_params(weight, scheme)
        return Parts(quantize_weight(weight, scale, offset, scheme), scale, offset)
    peak = weight.abs().amax(dim=1, keepdim=True) * learned.row_clip
    scale = (peak / scheme.dtype.max).clamp(min=EPS)
    offset = torch.zeros_like(scale)
    return Parts(quantize_weight(weight, scale, offset, scheme), scale, offset)

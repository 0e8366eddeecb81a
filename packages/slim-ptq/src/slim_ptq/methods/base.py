"""What a method is: a weight, a scheme and what its inputs were like, into codes.

A method knows nothing of models and files.  Each is a frozen dataclass in a file of its own, whose
fields are its options, checked when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from slim_core.kronecker import identity_transforms
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme, TensorScheme, Variant
from slim_ptq.methods.learned import LearnedTransform


class Needs(Flag):
    """What a method wants to know of the inputs of a layer."""

    NONE = 0
    MOMENTS = auto()  # mean square of every input channel
    HESSIAN = auto()  # mean of x xᵀ
    BLOCK = auto()  # what was learned with the other layers of its decoder block


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """What the inputs of a layer were like on all calibration data.

    Layers that read the same tensor (q, k, v; gate, up) share one of these.

    Parameters
    ----------
    count : int
        Number of tokens that reached the layer.
    hessian : torch.Tensor, optional
        float32, shape (in, in): the mean of ``x xᵀ`` over the tokens, half the Hessian of the
        mean squared output error with respect to a row of the weight.
    moments : torch.Tensor, optional
        float32, shape (in,): the mean of ``x**2``, the diagonal of ``hessian``.
    learned : LearnedTransform or Parts, optional
        If the block of the layer was trained: of FlatQuant, of learned rounding.
    memo : dict
        What methods have computed of these inputs alone, for the layers that share them.
    """

    count: int
    hessian: torch.Tensor | None = None
    moments: torch.Tensor | None = None
    learned: LearnedTransform | Parts | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class BatchInputs:
    """What the inputs of several layers were like.

    Parameters
    ----------
    layers : tuple of LayerInputs
    memo : dict
        What methods have computed of these inputs alone, for batches that share them.
    """

    layers: tuple[LayerInputs, ...]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A quantized weight.

    Parameters
    ----------
    codes : torch.Tensor
        int8, shape (out, in), one code an element.
    scale, offset : torch.Tensor
        float32, shapes of :func:`slim_core.numerics.weight_params`.
    extras : mapping
        Further tensors of the layer under their names on disk.
    notes : tuple of str
        What the report has to say of this layer: raised damping, channels without input.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def layer(
        self, name: str, scheme: QuantScheme, bias: torch.Tensor | None, model_dtype: str
    ) -> QuantizedLinear:
        """Return the layer that these parts make.

        The FlatQuant transforms of methods that know none are identities.
        """
        extras, notes = dict(self.extras), self.notes
        if scheme.variant is Variant.FLATQUANT and "left_trans" not in extras:
            extras |= identity_transforms(self.codes.shape[1], self.scale)
            notes += ("its transforms are identities, since the method trains none",)
        return QuantizedLinear(
            name,
            scheme,
            self.codes,
            self.scale,
            self.offset,
            bias=bias,
            model_dtype=model_dtype,
            notes=notes,
            extras=extras,
        )


class WeightMethod(Protocol):
    """One way to quantize a weight."""

    name: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What :meth:`quantize` has to be given."""

    def unsupported(self, scheme: QuantScheme) -> str | None:
        """Return why this method cannot quantize to a scheme, or None if it can."""

    def quantize(
        self,
        name: str,
        weight: torch.Tensor,
        scheme: TensorScheme,
        inputs: LayerInputs | None = None,
    ) -> Parts:
        """Quantize a weight.

        Parameters
        ----------
        name : str
            Of the layer, for messages.
        weight : torch.Tensor, floating point, shape (out, in)
        inputs : LayerInputs, optional
            There, with what :attr:`needs` names and at least one token, unless it needs nothing.

        Raises
        ------
        NumericalError
            The weight has NaN or infinite elements; names the layer.
        FormatError
            The group size does not divide the input channels.
        """


@runtime_checkable
class BatchMethod(WeightMethod, Protocol):
    """A method to which several small weights take less time together than one by one."""

    def quantize_batch(
        self,
        names: Sequence[str],
        weights: Sequence[torch.Tensor],
        scheme: TensorScheme,
        inputs: BatchInputs,
    ) -> list[Parts]:
        """Quantize weights of one shape, each as :meth:`WeightMethod.quantize` does.

        Raises
        ------
        NumericalError, FormatError
            As there, for the first weight that is wrong.
        """

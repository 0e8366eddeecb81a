"""The vocabulary of quantization schemes.

A scheme says with which value types, granularities and symmetries the weight and the activation of
a linear layer are quantized.  It is written as a short string, the Ascend type of the layer in
lower case with what that leaves open::

    w8a8                 int8 per-channel weights, static per-tensor asymmetric int8 activations
    w8a8_dynamic         int8 per-channel weights, per-token symmetric int8 activations
    w8a16_g128           int8 weights with one scale per group of 128 input channels
    w8a16_asym           int8 weights with a zero point per output channel
    w8a8_mix             w8a8 whose activations an engine may also quantize per token
    w8a8s                sparse: few weights outside the range of four bits
    w4a16_g128           int4 weights only
    w4a8_dynamic_g64     int4 weights within int8 ones (:mod:`slim_core.two_stage`)
    w4a4_dynamic         int4 weights and activations
    w4a4_flatquant_dynamic  the same after a learned transform of the input
    nf4                  4-bit NormalFloat in blocks of 64; ``nf4_b128`` in blocks of 128
    w8a8fp8_dynamic      FP8 E4M3, one scale per output channel and per token
    w8a8_mxfp8           FP8 E4M3 in groups of 32 with a shared power of two
    w4a8_mxfp            FP4 E2M1 weights, FP8 E4M3 activations, both in groups of 32
    w4a4_mxfp4           FP4 E2M1, both in groups of 32
    w4a4_mxfp4_flatquant the same after a learned transform of the input
    w4a16_mxfp4          FP4 E2M1 weights only, in groups of 32
    float                left in floating point

``_tensor`` asks for one scale for the whole weight matrix, ``_asym`` for zero points.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from slim_core.ascend_types import (
    ASCEND_TYPES,
    MX_GROUP,
    PER_TOKEN_FP8,
    PER_TOKEN_INT4,
    PER_TOKEN_INT8,
    REFUSED_TYPES,
    STATIC_INT8,
    TYPE_PRIORITY,
    AscendType,
    Variant,
    model_type,
)
from slim_core.dtypes import CodeType
from slim_core.errors import InvalidValueError
from slim_core.tensor_scheme import Granularity, ScaleKind, TensorScheme
from slim_core.validate import check_type, did_you_mean

__all__ = [
    "FLOAT",
    "KNOWN_SCHEMES",
    "MX_GROUP",
    "PER_TOKEN_FP8",
    "PER_TOKEN_INT4",
    "PER_TOKEN_INT8",
    "STATIC_INT8",
    "TYPE_PRIORITY",
    "Granularity",
    "QuantScheme",
    "ScaleKind",
    "TensorScheme",
    "Variant",
    "model_type",
]


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a linear layer is quantized; None stands for floating point.

    Activations are quantized with fixed parameters if their granularity is PER_TENSOR, with
    parameters found at run time if it is PER_TOKEN or PER_GROUP.
    """

    weight: TensorScheme | None
    activation: TensorScheme | None = None
    variant: Variant = Variant.NONE

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """Read a scheme from its short string.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            ``text`` is not a scheme, or a type that is known and not made; says why.
        """
        words = check_type("scheme", text, str).lower()
        if words == "float":
            return FLOAT
        if words.upper() in REFUSED_TYPES:
            reason = REFUSED_TYPES[words.upper()]
            raise InvalidValueError(f"scheme {text!r} cannot be made: {reason}")
        match = _GRAMMAR.fullmatch(words)
        scheme = _from_match(match) if match else None
        if scheme is None:
            raise InvalidValueError(
                f"scheme {text!r} is unknown; known are {', '.join(KNOWN_SCHEMES)}",
                hint=did_you_mean(words, KNOWN_SCHEMES),
            )
        return scheme

    @property
    def is_float(self) -> bool:
        """Whether the layer stays in floating point."""
        return self.weight is None

    @property
    def is_static(self) -> bool:
        """Whether activations are quantized with parameters fixed by calibration."""
        return self.activation is not None and not self.is_dynamic

    @property
    def is_dynamic(self) -> bool:
        """Whether activations are quantized with parameters found at run time."""
        return (
            self.activation is not None
            and self.activation.granularity is not Granularity.PER_TENSOR
        )

    @property
    def group_size(self) -> int:
        """Number of input channels of a weight that share a scale, 0 if it has no groups."""
        if self.weight is None or self.weight.granularity is not Granularity.PER_GROUP:
            return 0
        return self.weight.group_size

    @property
    def ascend_type(self) -> str:
        """Type name of the layer in a model description, for example ``W8A8_DYNAMIC``."""
        if self.weight is None:
            return "FLOAT"
        kind = _BY_KEY.get(self._key)
        if kind is None:
            raise InvalidValueError(f"scheme {self} has no Ascend type")
        return kind.name

    @property
    def _key(self) -> _Key:
        assert self.weight is not None
        powers = self.weight.scales is ScaleKind.E8M0
        activation = None if self.activation is None else self.activation.dtype
        return (self.weight.dtype, powers, activation, self.is_dynamic, self.variant)

    def __str__(self) -> str:
        if self.weight is None:
            return "float"
        kind = _BY_KEY.get(self._key)
        text = self._plain_name() if kind is None else kind.name.lower()
        if self.weight.granularity is Granularity.PER_TENSOR:
            text += "_tensor"
        elif kind is None or self.weight.group_size != kind.group_size:
            letter = "g" if kind is None else kind.letter
            text += f"_{letter}{self.weight.group_size}" if self.weight.group_size else ""
        return text if self.weight.symmetric else f"{text}_asym"

    def _plain_name(self) -> str:
        """Return a name of the same form for a scheme that has no Ascend type."""
        assert self.weight is not None
        activation = 16 if self.activation is None else self.activation.dtype.bits
        dynamic = "_dynamic" if self.is_dynamic else ""
        return f"w{self.weight.dtype.bits}a{activation}{dynamic}"


FLOAT = QuantScheme(weight=None)

_Key = tuple[CodeType, bool, CodeType | None, bool, Variant]


def _scheme(kind: AscendType, weight: TensorScheme) -> QuantScheme:
    return QuantScheme(weight, kind.activation, kind.variant)


_BY_NAME = {kind.name.lower(): kind for kind in ASCEND_TYPES}
_BY_KEY = {_scheme(kind, kind.weight_scheme())._key: kind for kind in ASCEND_TYPES}

KNOWN_SCHEMES = (
    "w8a8",
    "w8a8_dynamic",
    "w8a16",
    "w8a16_g128",
    "w8a16_asym",
    "w8a8_mix",
    "w8a8s",
    "w4a16",
    "w4a16_g128",
    "w4a8_dynamic",
    "w4a8_dynamic_g64",
    "w4a4_dynamic",
    "w4a4_flatquant_dynamic",
    "nf4",
    "w8a8fp8_dynamic",
    "w8a8_mxfp8",
    "w4a8_mxfp",
    "w4a4_mxfp4",
    "w4a4_mxfp4_flatquant",
    "w4a16_mxfp4",
    "float",
)

_GRAMMAR = re.compile(
    r"([a-z0-9_]+?)(?:_(?P<letter>[a-z])(?P<group>[1-9]\d{0,6})|(?P<tensor>_tensor))?(?P<asym>_asym)?",
    re.ASCII,
)


def _from_match(match: re.Match[str]) -> QuantScheme | None:
    kind = _BY_NAME.get(match[1])
    if (
        kind is None
        or (match["letter"] or kind.letter) != kind.letter
        or (match["tensor"] and not kind.tensor)
        or (match["asym"] and not kind.asymmetric)
    ):
        return None
    tensor, asymmetric = match["tensor"] is not None, match["asym"] is not None
    size = int(match["group"] or 0)
    return _scheme(kind, kind.weight_scheme(size, tensor=tensor, asymmetric=asymmetric))

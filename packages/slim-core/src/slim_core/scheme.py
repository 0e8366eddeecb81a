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
    w8a8_mxfp8           FP8 E4M3 in groups of 32 with a shared power of two
    w4a8_mxfp            FP4 E2M1 weights, FP8 E4M3 activations, both in groups of 32
    w4a4_mxfp4           FP4 E2M1, both in groups of 32
    float                left in floating point

``_tensor`` asks for one scale for the whole weight matrix, ``_asym`` for zero points.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from slim_core.dtypes import INT4, INT8, CodeType
from slim_core.errors import InvalidValueError
from slim_core.tables import FP4, FP8, NF4
from slim_core.validate import check_int, check_type, did_you_mean


class Granularity(str, Enum):
    """Over which elements one scale is shared."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"  # one scale per output channel (row) of a weight
    PER_GROUP = "per_group"  # one scale per group of input channels of each row
    PER_BLOCK = "per_block"  # one scale per block of consecutive elements, rows after one another
    PER_TOKEN = "per_token"  # one scale per row of an activation, found at run time


class ScaleKind(str, Enum):
    """What kind of number a scale is."""

    FLOAT = "float"
    TWO_STAGE = "two_stage"  # an integer per group times a float per channel, arXiv:2405.04532
    E8M0 = "e8m0"  # a power of two, of the OCP microscaling formats


class Variant(str, Enum):
    """What tells apart layers of equal value types that are made or run in different ways."""

    NONE = "none"
    SPARSE = "sparse"  # W8A8S: the weight scale is not stored
    MIX = "mix"  # W8A8_MIX: static activations in decode, per-token ones in prefill
    FLATQUANT = "flatquant"  # learned affine transforms of the input, arXiv:2410.09426


@dataclass(frozen=True, slots=True)
class TensorScheme:
    """How one tensor is quantized.

    Parameters
    ----------
    dtype : IntType or TableType
    granularity : Granularity
    symmetric : bool
        Whether the zero point is fixed at 0.
    group_size : int
        Number of input channels (PER_GROUP) or elements (PER_BLOCK) that share a scale, else 0.
    scales : ScaleKind
    """

    dtype: CodeType
    granularity: Granularity
    symmetric: bool = True
    group_size: int = 0
    scales: ScaleKind = ScaleKind.FLOAT

    def __post_init__(self) -> None:
        grouped = self.granularity in (Granularity.PER_GROUP, Granularity.PER_BLOCK)
        check_int(
            "group_size", self.group_size, low=1 if grouped else 0, high=None if grouped else 0
        )


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
            ``text`` is not a scheme.
        """
        words = check_type("scheme", text, str).lower()
        if words == "float":
            return FLOAT
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
        return kind.type

    @property
    def _key(self) -> _Key:
        assert self.weight is not None
        activation = None if self.activation is None else self.activation.dtype
        return (self.weight.dtype, activation, self.is_dynamic, self.variant)

    def __str__(self) -> str:
        if self.weight is None:
            return "float"
        kind = _BY_KEY.get(self._key)
        text = self._plain_name() if kind is None else kind.type.lower()
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

STATIC_INT8 = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)
PER_TOKEN_INT8 = TensorScheme(INT8, Granularity.PER_TOKEN)
PER_TOKEN_INT4 = TensorScheme(INT4, Granularity.PER_TOKEN)
MX_GROUP = 32
_MXFP8, _MXFP4 = (
    TensorScheme(dtype, Granularity.PER_GROUP, True, MX_GROUP, ScaleKind.E8M0)
    for dtype in (FP8, FP4)
)

_Key = tuple[CodeType, CodeType | None, bool, Variant]


@dataclass(frozen=True, slots=True)
class _Kind:
    """An Ascend type and what its weights can be besides per channel and symmetric.

    ``group_size`` is that of a text which gives none, ``letter`` stands before one in the text.
    """

    type: str
    weight: CodeType
    activation: TensorScheme | None = None
    variant: Variant = Variant.NONE
    group_size: int = 0
    letter: str = ""
    tensor: bool = False
    asymmetric: bool = False
    group_scales: ScaleKind = ScaleKind.FLOAT

    @property
    def key(self) -> _Key:
        return QuantScheme(
            TensorScheme(self.weight, Granularity.PER_CHANNEL), self.activation, self.variant
        )._key


# In the order of TYPE_PRIORITY.
_KINDS = (
    _Kind("NF4", NF4, group_size=64, letter="b"),
    _Kind("W4A16", INT4, letter="g", tensor=True, asymmetric=True),
    _Kind("W8A16", INT8, letter="g", tensor=True, asymmetric=True),
    _Kind("W8A8_DYNAMIC", INT8, PER_TOKEN_INT8, tensor=True),
    _Kind("W8A8_MIX", INT8, STATIC_INT8, Variant.MIX, tensor=True),
    _Kind("W8A8", INT8, STATIC_INT8, tensor=True),
    _Kind("W8A8S", INT8, STATIC_INT8, Variant.SPARSE, tensor=True),
    _Kind("W8A8_MXFP8", FP8, _MXFP8, group_size=MX_GROUP, group_scales=ScaleKind.E8M0),
    _Kind("W4A8_DYNAMIC", INT4, PER_TOKEN_INT8, letter="g", group_scales=ScaleKind.TWO_STAGE),
    _Kind("W4A8_MXFP", FP4, _MXFP8, group_size=MX_GROUP, group_scales=ScaleKind.E8M0),
    _Kind("W4A4_DYNAMIC", INT4, PER_TOKEN_INT4),
    _Kind("W4A4_FLATQUANT_DYNAMIC", INT4, PER_TOKEN_INT4, Variant.FLATQUANT),
    _Kind("W4A4_MXFP4", FP4, _MXFP4, group_size=MX_GROUP, group_scales=ScaleKind.E8M0),
)
_BY_NAME = {kind.type.lower(): kind for kind in _KINDS}
_BY_KEY = {kind.key: kind for kind in _KINDS}

# What a mixed model is called as a whole: the last of these that it contains.
TYPE_PRIORITY = ("FLOAT", *(kind.type for kind in _KINDS))
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
    "w8a8_mxfp8",
    "w4a8_mxfp",
    "w4a4_mxfp4",
    "float",
)

_GRAMMAR = re.compile(
    r"([a-z0-9_]+?)(?:_(?P<letter>[a-z])(?P<group>[1-9]\d{0,6})|(?P<tensor>_tensor))?(?P<asym>_asym)?",
    re.ASCII,
)


def model_type(types: set[str]) -> str:
    """Return the type name of a model whose layers have these type names."""
    return max(types, key=TYPE_PRIORITY.index, default="FLOAT")


def _from_match(match: re.Match[str]) -> QuantScheme | None:
    kind = _BY_NAME.get(match[1])
    if (
        kind is None
        or (match["letter"] or kind.letter) != kind.letter
        or (match["tensor"] and not kind.tensor)
        or (match["asym"] and not kind.asymmetric)
    ):
        return None
    size = int(match["group"] or kind.group_size)
    scales = ScaleKind.FLOAT
    granularity = Granularity.PER_CHANNEL
    if match["tensor"]:
        granularity = Granularity.PER_TENSOR
    elif kind.letter == "b":
        granularity = Granularity.PER_BLOCK
    elif size:
        granularity, scales = Granularity.PER_GROUP, kind.group_scales
    weight = TensorScheme(kind.weight, granularity, match["asym"] is None, size, scales)
    return QuantScheme(weight, kind.activation, kind.variant)

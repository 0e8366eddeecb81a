"""The vocabulary of quantization schemes.

A scheme says with which integer types, granularities and symmetries the weight and the activation
of a linear layer are quantized.  It is written as a short string::

    w8a8                 int8 per-channel weights, static per-tensor asymmetric int8 activations
    w8a8_dynamic         int8 per-channel weights, per-token symmetric int8 activations
    w8a16                int8 per-channel weights only
    w8a16_g128           int8 weights with one scale per group of 128 input channels
    w8a16_asym           int8 weights with a zero point per output channel
    float                left in floating point

``_tensor`` asks for one scale for the whole weight matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from slim_core.dtypes import INT8, IntType
from slim_core.errors import InvalidValueError
from slim_core.validate import check_int, check_type, did_you_mean


class Granularity(str, Enum):
    """Over which elements one scale is shared."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"  # one scale per output channel (row) of a weight
    PER_GROUP = "per_group"  # one scale per group of input channels of each row
    PER_TOKEN = "per_token"  # one scale per row of an activation, found at run time


@dataclass(frozen=True, slots=True)
class TensorScheme:
    """How one tensor is quantized.

    Parameters
    ----------
    dtype : IntType
    granularity : Granularity
    symmetric : bool
        Whether the zero point is fixed at 0.
    group_size : int
        Number of input channels that share a scale; 0 unless the granularity is PER_GROUP.
    """

    dtype: IntType
    granularity: Granularity
    symmetric: bool = True
    group_size: int = 0

    def __post_init__(self) -> None:
        grouped = self.granularity is Granularity.PER_GROUP
        check_int(
            "group_size", self.group_size, low=1 if grouped else 0, high=None if grouped else 0
        )


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a linear layer is quantized; None stands for floating point.

    Activations are quantized with fixed parameters, unless their granularity is PER_TOKEN.
    """

    weight: TensorScheme | None
    activation: TensorScheme | None = None

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """Read a scheme from its short string.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            ``text`` is not a scheme, or there is no Ascend type for it.
        """
        words = check_type("scheme", text, str).lower()
        if words == "float":
            return FLOAT
        match = _GRAMMAR.fullmatch(words)
        scheme = _from_match(match) if match else None
        if scheme is None or scheme._key not in ASCEND_TYPES:
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
        """Whether activations are quantized with parameters found for each token at run time."""
        return self.activation is not None and self.activation.granularity is Granularity.PER_TOKEN

    @property
    def group_size(self) -> int:
        """Group size of the weight, 0 if it is not grouped."""
        return 0 if self.weight is None else self.weight.group_size

    @property
    def ascend_type(self) -> str:
        """Type name of the layer in a model description, for example ``W8A8_DYNAMIC``."""
        if self._key not in ASCEND_TYPES:
            raise InvalidValueError(f"scheme {self} has no Ascend type")
        return ASCEND_TYPES[self._key]

    @property
    def _key(self) -> tuple[int, int, bool]:
        if self.weight is None:
            return (16, 16, False)
        activation = 16 if self.activation is None else self.activation.dtype.bits
        return (self.weight.dtype.bits, activation, self.is_dynamic)

    def __str__(self) -> str:
        if self.weight is None:
            return "float"
        weight, activation, dynamic = self._key
        text = f"w{weight}a{activation}" + ("_dynamic" if dynamic else "")
        if self.weight.granularity is Granularity.PER_GROUP:
            text += f"_g{self.weight.group_size}"
        elif self.weight.granularity is Granularity.PER_TENSOR:
            text += "_tensor"
        return text if self.weight.symmetric else f"{text}_asym"


# (weight bits, activation bits, dynamic) -> type name in the description of a checkpoint
ASCEND_TYPES = {
    (16, 16, False): "FLOAT",
    (8, 8, False): "W8A8",
    (8, 8, True): "W8A8_DYNAMIC",
    (8, 16, False): "W8A16",
}
KNOWN_SCHEMES = ("w8a8", "w8a8_dynamic", "w8a16", "w8a16_g128", "w8a16_asym", "float")

# What a mixed model is called as a whole: the last of these that it contains.
TYPE_PRIORITY = ("FLOAT", "W8A16", "W8A8_DYNAMIC", "W8A8")

FLOAT = QuantScheme(weight=None)

_GRAMMAR = re.compile(
    r"w([1-9]\d?)a([1-9]\d?)(_dynamic)?(?:_g([1-9]\d{0,6})|(_tensor))?(_asym)?", re.ASCII
)


def model_type(types: set[str]) -> str:
    """Return the type name of a model whose layers have these type names."""
    return max(types, key=TYPE_PRIORITY.index, default="FLOAT")


def _from_match(match: re.Match[str]) -> QuantScheme | None:
    weight_bits, activation_bits, dynamic, group, tensor, asymmetric = match.groups()
    if not 2 <= int(weight_bits) <= 8:
        return None
    granularity = (
        Granularity.PER_GROUP
        if group
        else Granularity.PER_TENSOR
        if tensor
        else Granularity.PER_CHANNEL
    )
    weight = TensorScheme(
        IntType(int(weight_bits)), granularity, asymmetric is None, int(group or 0)
    )
    if activation_bits == "16":
        return None if dynamic else QuantScheme(weight)
    # Integer products are folded with one scale a row and no weight zero point.
    if activation_bits != "8" or asymmetric or group:
        return None
    if dynamic:
        return QuantScheme(weight, TensorScheme(INT8, Granularity.PER_TOKEN))
    return QuantScheme(weight, TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False))

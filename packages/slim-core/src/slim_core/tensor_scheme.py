"""How one tensor is quantized: value type, granularity, symmetry, kind of scales."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from slim_core.dtypes import CodeType
from slim_core.validate import check_int


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

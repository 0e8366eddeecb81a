"""The types of linear layers in Ascend model descriptions, a row for each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from slim_core.dtypes import INT4, INT8, CodeType
from slim_core.tables import FP4, FP8, NF4
from slim_core.tensor_scheme import Granularity, ScaleKind, TensorScheme


class Variant(str, Enum):
    """What tells apart layers of equal value types that are made or run in different ways."""

    NONE = "none"
    SPARSE = "sparse"  # W8A8S: the weight scale is not stored
    MIX = "mix"  # W8A8_MIX: static activations in decode, per-token ones in prefill
    FLATQUANT = "flatquant"  # learned affine transforms of the input, arXiv:2410.09426


MX_GROUP = 32  # elements that share a scale in the OCP microscaling formats

STATIC_INT8 = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)
PER_TOKEN_INT8 = TensorScheme(INT8, Granularity.PER_TOKEN)
PER_TOKEN_INT4 = TensorScheme(INT4, Granularity.PER_TOKEN)
PER_TOKEN_FP8 = TensorScheme(FP8, Granularity.PER_TOKEN)
MXFP8, MXFP4 = (
    TensorScheme(dtype, Granularity.PER_GROUP, True, MX_GROUP, ScaleKind.E8M0)
    for dtype in (FP8, FP4)
)


@dataclass(frozen=True, slots=True)
class AscendType:
    """A type and what its weights can be besides per channel and symmetric.

    Parameters
    ----------
    name : str
        As descriptions have it; in lower case it is the name of the scheme.
    weight : IntType or TableType
    activation : TensorScheme, optional
        None if activations stay in floating point.
    variant : Variant
    group_size : int
        Of a scheme whose text gives none.
    letter : str
        What stands before a group size in the text; weights have no groups without it, unless
        ``group_size`` says so.
    tensor, asymmetric : bool
        Whether ``_tensor`` and ``_asym`` are possible.
    group_scales : ScaleKind
        Of weights in groups.
    """

    name: str
    weight: CodeType
    activation: TensorScheme | None = None
    variant: Variant = Variant.NONE
    group_size: int = 0
    letter: str = ""
    tensor: bool = False
    asymmetric: bool = False
    group_scales: ScaleKind = ScaleKind.FLOAT

    def weight_scheme(
        self, group_size: int = 0, *, tensor: bool = False, asymmetric: bool = False
    ) -> TensorScheme:
        """Return how weights are quantized; with a group size of 0, as where none is given."""
        size = group_size or self.group_size
        if tensor:
            return TensorScheme(self.weight, Granularity.PER_TENSOR, not asymmetric)
        if self.letter == "b":
            return TensorScheme(self.weight, Granularity.PER_BLOCK, not asymmetric, size)
        if not size:
            return TensorScheme(self.weight, Granularity.PER_CHANNEL, not asymmetric)
        return TensorScheme(
            self.weight, Granularity.PER_GROUP, not asymmetric, size, self.group_scales
        )


# In the order of TYPE_PRIORITY.
ASCEND_TYPES = (
    AscendType("NF4", NF4, group_size=64, letter="b"),
    AscendType("W4A16", INT4, letter="g", tensor=True, asymmetric=True),
    AscendType("W4A16_MXFP4", FP4, None, group_size=MX_GROUP, group_scales=ScaleKind.E8M0),
    AscendType("W8A16", INT8, letter="g", tensor=True, asymmetric=True),
    AscendType("W8A8_DYNAMIC", INT8, PER_TOKEN_INT8, tensor=True),
    AscendType("W8A8_MIX", INT8, STATIC_INT8, Variant.MIX, tensor=True),
    AscendType("W8A8", INT8, STATIC_INT8, tensor=True),
    AscendType("W8A8S", INT8, STATIC_INT8, Variant.SPARSE, tensor=True),
    AscendType("W8A8FP8_DYNAMIC", FP8, PER_TOKEN_FP8),
    AscendType("W8A8_MXFP8", FP8, MXFP8, group_size=MX_GROUP, group_scales=ScaleKind.E8M0),
    AscendType("W4A8_DYNAMIC", INT4, PER_TOKEN_INT8, letter="g", group_scales=ScaleKind.TWO_STAGE),
    AscendType("W4A8_MXFP", FP4, MXFP8, group_size=MX_GROUP, group_scales=ScaleKind.E8M0),
    AscendType("W4A4_DYNAMIC", INT4, PER_TOKEN_INT4),
    AscendType("W4A4_FLATQUANT_DYNAMIC", INT4, PER_TOKEN_INT4, Variant.FLATQUANT),
    AscendType("W4A4_MXFP4", FP4, MXFP4, group_size=MX_GROUP, group_scales=ScaleKind.E8M0),
    AscendType(
        "W4A4_MXFP4_FLATQUANT",
        FP4,
        MXFP4,
        Variant.FLATQUANT,
        group_size=MX_GROUP,
        group_scales=ScaleKind.E8M0,
    ),
)

# Types that descriptions of other tools may have, and why there are no schemes of them.
REFUSED_TYPES = {
    "W4A4_MXFP4_DUALSCALE": "no engine reads it; w4a4_mxfp4 has the same weights with one scale",
    "W4A4_MXFP4_SVD": "no engine reads it; w4a4_mxfp4 has the same weights without a correction",
    "W8A8_TIMESTEP": "it belongs to diffusion models, which slim does not quantize",
    "W8A8SC": "it is a W8A8S checkpoint after slim-compress: quantize to w8a8s",
    "W16A16S": "its weights stay in floating point, and no engine is known to read it",
    "W16A16SC": "its weights stay in floating point, and no engine is known to read it",
    "WFP8AFP8_DYNAMIC": "engines read it under the name W8A8FP8_DYNAMIC: use w8a8fp8_dynamic",
}

# What a mixed model is called as a whole: the last of these that it contains.
TYPE_PRIORITY = ("FLOAT", *(kind.name for kind in ASCEND_TYPES))


def model_type(types: set[str]) -> str:
    """Return the type name of a model whose layers have these type names."""
    return max(types, key=TYPE_PRIORITY.index, default="FLOAT")

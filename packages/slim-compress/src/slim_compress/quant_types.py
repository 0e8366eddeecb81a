"""Type strings of quantized checkpoints as far as the compressor deals with them."""

from __future__ import annotations

from enum import Enum


class QuantType(str, Enum):
    """Values of a tensor in ``quant_model_description.json``."""

    UNKNOWN = "UNKNOWN"
    FLOAT = "FLOAT"
    W16A16S = "W16A16S"
    W16A16SC = "W16A16SC"
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W8A8 = "W8A8"
    W8A8S = "W8A8S"
    W8A8SC = "W8A8SC"
    W8A8SC_SLC1 = "W8A8SC_SLC1"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W8A8_MIX = "W8A8_MIX"
    W8A8_TIMESTEP = "W8A8_TIMESTEP"
    W4A8_DYNAMIC = "W4A8_DYNAMIC"
    W4A4_DYNAMIC = "W4A4_DYNAMIC"
    W4A4_FLATQUANT_DYNAMIC = "W4A4_FLATQUANT_DYNAMIC"
    NF4 = "NF4"
    C8 = "C8"
    FAQUANT = "FAQuant"

    def __str__(self) -> str:
        return self.value


TYPE_NAMES = frozenset(member.value for member in QuantType)

# Codec -> type of the tensors that it writes. They differ on purpose: slc1 is decoded by this
# package and by no hardware.
COMPRESSED_TYPE = {"slc1": QuantType.W8A8SC_SLC1, "device": QuantType.W8A8SC}

META_KEYS = frozenset(
    {
        "model_quant_type",
        "version",
        "group_size",
        "kv_quant_type",
        "kv_cache_type",
        "fa_quant_type",
        "reduce_quant_type",
        "metadata",
        "optional",
    }
)

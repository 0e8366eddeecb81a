"""On-disk formats of quantized checkpoints, by name."""

from slim_core.formats.ascend import (
    DESCRIPTION_FILE,
    AscendV1Format,
    SafeTensorFormat,
    decode_deq_scale,
    encode_deq_scale,
    scale_bias,
)
from slim_core.formats.base import Format, to_numpy
from slim_core.formats.float import FloatFormat
from slim_core.formats.npy import NpyWriter

FORMATS: dict[str, Format] = {
    form.name: form for form in (AscendV1Format(), SafeTensorFormat(), FloatFormat())
}

__all__ = [
    "DESCRIPTION_FILE",
    "FORMATS",
    "AscendV1Format",
    "FloatFormat",
    "Format",
    "NpyWriter",
    "SafeTensorFormat",
    "decode_deq_scale",
    "encode_deq_scale",
    "scale_bias",
    "to_numpy",
]

"""On-disk formats of quantized checkpoints, by name."""

from slim_core.formats.ascend import (
    DESCRIPTION_FILE,
    AscendV1Format,
    SafeTensorFormat,
    decode_deq_scale,
    encode_deq_scale,
    scale_bias,
)
from slim_core.formats.awq import AwqFormat
from slim_core.formats.base import Format, to_numpy
from slim_core.formats.compressed_tensors import CompressedTensorsFormat
from slim_core.formats.float import FloatFormat
from slim_core.formats.gptq import GptqFormat
from slim_core.formats.npy import NpyWriter

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        AscendV1Format(),
        SafeTensorFormat(),
        FloatFormat(),
        CompressedTensorsFormat(),
        GptqFormat(),
        AwqFormat(),
    )
}

ASCEND_FORMATS = (AscendV1Format.name, SafeTensorFormat.name)

__all__ = [
    "ASCEND_FORMATS",
    "DESCRIPTION_FILE",
    "FORMATS",
    "AscendV1Format",
    "AwqFormat",
    "CompressedTensorsFormat",
    "FloatFormat",
    "Format",
    "GptqFormat",
    "NpyWriter",
    "SafeTensorFormat",
    "decode_deq_scale",
    "encode_deq_scale",
    "scale_bias",
    "to_numpy",
]

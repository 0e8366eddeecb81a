"""What inference engines make of the types: facts that a user wants to know before a long run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from slim_core.groups import is_expert
from slim_core.scheme import Granularity, QuantScheme, Variant

# Types that not every engine for the Ascend layouts reads, and which do.
_LIMITED = {
    "NF4": "no inference engine reads NF4; slim itself opens and dequantizes it",
    "W4A16": "W4A16 is read by MindIE only, fastest with groups of 128",
    "W8A8_MIX": "W8A8_MIX is read by vllm-ascend from v0.12 on and by MindIE",
    "W8A8S": "W8A8S is read on Ascend 310P (vllm-ascend, MindIE), for float16 models",
    "W8A8FP8_DYNAMIC": "W8A8FP8_DYNAMIC is read by vllm-ascend, on Ascend 950",
    "W4A16_MXFP4": "W4A16_MXFP4 is read by vllm-ascend, of experts only, on Ascend 950",
    "W8A8_MXFP8": "W8A8_MXFP8 is read by vllm-ascend from v0.13 on, on Ascend 950",
    "W4A8_MXFP": "W4A8_MXFP is read by vllm-ascend from v0.21 on, on Ascend 950",
    "W4A4_MXFP4": "W4A4_MXFP4 is read by vllm-ascend from v0.19.1 on, on Ascend 950",
    "W4A4_MXFP4_FLATQUANT": (
        "W4A4_MXFP4_FLATQUANT is read by vllm-ascend from v0.20.2 on, on Ascend 950, without "
        "tensor parallelism"
    ),
    "W4A4_DYNAMIC": "W4A4_DYNAMIC is read by vllm-ascend from v0.14 on and by SGLang",
    "W4A4_FLATQUANT_DYNAMIC": "W4A4_FLATQUANT_DYNAMIC is read by vllm-ascend from v0.11 on",
}
_EXPERT_TYPES = (
    *("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A8FP8_DYNAMIC"),
    *("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "W4A16_MXFP4"),
)


def reader_warnings(schemes: Mapping[str, QuantScheme], model_dtype: str) -> Iterator[str]:
    """Yield what not every engine reads of layers of these schemes, by their names."""
    quantized = {name: scheme for name, scheme in schemes.items() if scheme.weight is not None}
    weights = [scheme.weight for scheme in quantized.values() if scheme.weight is not None]
    kinds = _in_order(scheme.ascend_type for scheme in quantized.values())
    if any(not weight.symmetric for weight in weights):
        yield "asymmetric weights load correctly only in MindIE (vllm-ascend adds the offset)"
    if any(s.ascend_type == "W8A16" and s.group_size for s in quantized.values()):
        yield "per-group W8A16 weights are read by MindIE only"
    if any(weight.granularity is Granularity.PER_TENSOR for weight in weights):
        yield "per-tensor weights are read by MindIE only (vllm-ascend wants one scale a channel)"
    yield from (_LIMITED[kind] for kind in kinds if kind in _LIMITED)
    yield from _w4a8_warnings(quantized)
    if model_dtype == "bfloat16" and any(
        scheme.variant is Variant.SPARSE for scheme in quantized.values()
    ):
        yield "W8A8S of a bfloat16 model: engines run sparse weights in float16"
    experts = _in_order(s.ascend_type for name, s in quantized.items() if is_expert(name))
    for kind in experts:
        if kind not in _EXPERT_TYPES:
            yield f"vllm-ascend has no kernel for experts of type {kind}"


def _w4a8_warnings(schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
    """Yield which versions read W4A8_DYNAMIC: experts and other layers, in groups and in rows."""
    found = {
        (is_expert(name), bool(scheme.group_size))
        for name, scheme in schemes.items()
        if scheme.ascend_type == "W4A8_DYNAMIC"
    }
    if (False, False) in found:
        yield "W4A8_DYNAMIC per channel is read by MindIE; vllm-ascend reads it of experts only"
    if (False, True) in found:
        yield "W4A8_DYNAMIC in groups is read by MindIE and by vllm-ascend up to v0.25.1rc1"
    if (True, True) in found:
        yield "vllm-ascend after v0.25.1rc1 reads W4A8_DYNAMIC experts per channel only"


def _in_order(kinds: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(kinds))

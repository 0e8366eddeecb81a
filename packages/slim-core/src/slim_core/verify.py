"""Checking a written checkpoint against what inference engines need, by reading it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from slim_core.attention_types import read_attention
from slim_core.errors import SlimError
from slim_core.files import PathLike
from slim_core.formats import DESCRIPTION_FILE, decode_deq_scale
from slim_core.groups import group_by
from slim_core.layers import QuantizedLinear
from slim_core.progress import track
from slim_core.quantized import QuantizedCheckpoint


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at and what is wrong; sound if ``problems`` is empty."""

    layers: int
    tensors: int
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_checkpoint(path: PathLike) -> Verification:
    """Read a quantized checkpoint again and look for everything that makes engines fail.

    * every tensor is described, and every described layer is there
    * dtypes, shapes and value ranges of every tensor of every layer
    * ``deq_scale`` and ``quant_bias`` are those of the codes and scales, bit for bit
    * layers that engines run as one share type and activation parameters
    * scales and offsets of int8 caches and attention belong together and are announced
    * no NaN or infinity, no ``quantization_config``, no index of other weights

    Raises
    ------
    CheckpointError
        The directory is no quantized checkpoint at all.
    """
    stored = QuantizedCheckpoint(path)
    problems = list(_directory_problems(stored))
    inputs: dict[str, tuple[float, float] | None] = {}
    for name in track(list(stored.layers), "Verifying"):
        try:
            layer = stored.layer(name)
        except SlimError as error:
            problems.append(error.message)
            continue
        problems += _layer_problems(layer, stored.tensors_of(name))
        inputs[name] = (
            None
            if layer.input_scale is None or layer.input_offset is None
            else (float(layer.input_scale[0]), float(layer.input_offset[0]))
        )
    problems += _group_problems(stored, inputs)
    try:
        read_attention(stored.description, stored.checkpoint.load)
    except SlimError as error:
        problems.append(error.message)
    return Verification(len(stored.layers), len(stored.checkpoint.tensors), tuple(problems))


def _directory_problems(stored: QuantizedCheckpoint) -> Iterator[str]:
    tensors, description = stored.checkpoint.tensors, stored.description
    yield from (f"{name} is not in the description" for name in tensors if name not in description)
    yield from (
        f"{name}.weight is described and not stored"
        for name in stored.layers
        if f"{name}.weight" not in tensors
    )
    if "model_quant_type" not in description:
        yield f"{stored.description_file.name} has no model_quant_type"
    group_size = description.get("group_size", 0)
    if not isinstance(group_size, int):
        yield f"group_size must be an integer, not {group_size!r}"
    config: dict[str, Any] = stored.checkpoint.config
    for holder in (config, config.get("text_config") or {}):
        if "quantization_config" in holder:
            yield "config.json has a quantization_config, which hides the description from vLLM"
    directory = stored.checkpoint.path
    if (directory / "model.safetensors.index.json").exists():
        yield "the index of the float model is still there, vLLM would follow it"
    known = {info.file.name for info in tensors.values()}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in known:
            yield f"{file.name} is no part of the checkpoint, vLLM would load it too"
    if stored.description_file.name == DESCRIPTION_FILE and description.get("version") != "1.0.0":
        yield f"{DESCRIPTION_FILE} must have version 1.0.0"


def _layer_problems(layer: QuantizedLinear, tensors: dict[str, np.ndarray]) -> Iterator[str]:
    broken = [
        f"{layer.name}.{local} has NaN or infinite elements"
        for local, tensor in tensors.items()
        if tensor.dtype.kind not in "iu" and not np.isfinite(tensor.astype(np.float32)).all()
    ]
    if broken:  # nothing follows from such numbers
        yield from broken
        return
    if (layer.weight_scale <= 0).any():
        yield f"{layer.name}.weight_scale has elements that are not positive"
    if not layer.scheme.is_static:
        return
    deq_scale, quant_bias = layer.folded()
    if not np.array_equal(decode_deq_scale(tensors["deq_scale"]), deq_scale):
        yield f"{layer.name}.deq_scale is not input_scale times weight_scale"
    if not np.array_equal(tensors["quant_bias"], quant_bias):
        yield f"{layer.name}.quant_bias does not follow from codes, scales and bias"


def _group_problems(
    stored: QuantizedCheckpoint, inputs: dict[str, tuple[float, float] | None]
) -> Iterator[str]:
    described = [
        name.removesuffix(".weight")
        for name, kind in stored.description.items()
        if name.endswith(".weight") and isinstance(kind, str)
    ]
    for group, members in group_by(described).items():
        kinds = {stored.description[f"{name}.weight"] for name in members}
        if len(kinds) > 1:
            yield f"{group} mixes {', '.join(sorted(kinds))}: engines run it as one matrix"
    for group, members in group_by(inputs, "input").items():
        if len({inputs[name] for name in members}) > 1:
            yield f"the layers of {group} have different input_scale or input_offset"

"""Checking a written checkpoint against what inference engines need, by reading it again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from slim_core.attention_types import read_attention
from slim_core.errors import SlimError
from slim_core.files import PathLike
from slim_core.formats import DESCRIPTION_FILE
from slim_core.groups import group_by
from slim_core.progress import track
from slim_core.quantized import QuantizedCheckpoint
from slim_core.tensor_parallel import COMMUNICATION_KEYS, GATHER
from slim_core.verify_layer import layer_problems, shared_input


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
    * ``deq_scale`` and ``quant_bias`` are those of the codes and scales, bit for bit;
      ``scale_bias`` is that of the weight
    * layers that engines run as one share type, activation parameters and transforms
    * the slices of a layer fit its weight and the scales of what devices exchange
    * scales and offsets of int8 caches and attention belong together and are announced
    * no NaN or infinity, no ``quantization_config``, no index of other weights

    Raises
    ------
    CheckpointError
        The directory is no quantized checkpoint at all.
    """
    stored = QuantizedCheckpoint(path)
    problems = list(_directory_problems(stored))
    inputs: dict[str, Hashable] = {}
    sizes: set[int] = set()
    for name in track(list(stored.layers), "Verifying"):
        try:
            layer = stored.layer(name)
        except SlimError as error:
            problems.append(error.message)
            continue
        problems += layer_problems(layer, stored.tensors_of(name))
        sizes.add(layer.scheme.group_size)
        inputs[name] = shared_input(layer)
    problems += _group_size_problems(stored, sizes - {0})
    problems += _group_problems(stored, inputs)
    for name in stored.slices:
        try:
            stored.sliced(name)
        except SlimError as error:
            problems.append(error.message)
    problems += _communication_problems(stored)
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


def _communication_problems(stored: QuantizedCheckpoint) -> Iterator[str]:
    """Yield why devices would not round what they exchange, or round with scales not there."""
    rounded = any(f"{name}.{GATHER}" in stored.checkpoint.tensors for name in stored.slices)
    for key, value in COMMUNICATION_KEYS.items():
        if rounded and stored.description.get(key) != value:
            yield f"layers have a {GATHER}, and the description has no {key} {value!r}"
        if not rounded and key in stored.description:
            yield f"the description has {key}, and no layer has a {GATHER}"


def _group_size_problems(stored: QuantizedCheckpoint, sizes: set[int]) -> Iterator[str]:
    """Yield why the group size of the description is not that of the layers."""
    said = stored.description.get("group_size", 0)
    if type(said) is not int:
        yield f"group_size must be an integer, not {said!r}"
    elif sizes and "version" in stored.description and sizes != {said}:
        found = ", ".join(str(size) for size in sorted(sizes))
        yield f"group_size is {said} in the description, and {found} in the layers"


def _group_problems(stored: QuantizedCheckpoint, inputs: dict[str, Hashable]) -> Iterator[str]:
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
            yield f"the layers of {group} have different input_scale, input_offset or transforms"

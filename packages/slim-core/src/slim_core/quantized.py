"""Reading quantized checkpoints back: the description file and the layers it describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slim_core.ascend_types import REFUSED_TYPES
from slim_core.attention_types import attention_tensors
from slim_core.checkpoint import Checkpoint, open_checkpoint
from slim_core.checkpoint.discover import read_json_object
from slim_core.errors import CheckpointError, FormatError
from slim_core.files import PathLike, as_path
from slim_core.formats import DESCRIPTION_FILE, FORMATS, Format
from slim_core.formats.codes import stored_shape
from slim_core.layers import QuantizedLinear
from slim_core.scheme import TYPE_PRIORITY, QuantScheme, ScaleKind
from slim_core.tensor_parallel import SlicedLinear, count_slices, read_sliced, slice_name
from slim_core.two_stage import SECOND_SCALE

ADDED_NORM_BIAS = "added_norm_bias"  # key in the metadata of a description

# Which tensor tells the granularity, where it is not weight_scale.
_SCALE_SOURCES = {"W8A8S": "deq_scale", "NF4": "weight_absmax"}


class QuantizedCheckpoint:
    """A directory in the ``ascend_v1`` or ``safe_tensor`` format.

    Parameters
    ----------
    path : path
        Directory with a description file.

    Attributes
    ----------
    checkpoint : Checkpoint
        The tensors.
    description : dict
        The whole description file.
    description_file : Path
    layers : dict
        Type of each quantized layer by its name, the slices of a sliced layer being layers.
    slices : dict
        Number of slices of each sliced layer (:mod:`slim_core.tensor_parallel`) by its name.
    attention_tensors : frozenset of str
        Names of the tensors of quantized caches and attention.

    Raises
    ------
    CheckpointError
        There is no description, or more than one.
    FormatError
        A layer has a type that slim does not read, or its slices are not numbered from 0 on.
    """

    def __init__(self, path: PathLike) -> None:
        root = as_path("path", path)
        self.description_file = find_description(root)
        self.checkpoint: Checkpoint = open_checkpoint(root)
        self.description: dict[str, Any] = read_json_object(self.description_file)
        self.layers: dict[str, str] = _quantized_layers(self.description)
        self.slices: dict[str, int] = count_slices(self.layers)
        for name in self.slices:  # its own weight has no scales
            self.layers.pop(name, None)
        self.attention_tensors = attention_tensors(self.description)
        self._by_layer: dict[str, list[str]] = {}
        for tensor in self.checkpoint.tensors:
            self._by_layer.setdefault(tensor.rpartition(".")[0], []).append(tensor)

    @property
    def model_dtype(self) -> str:
        """Dtype of the model as its configuration declares it, else of the stored norms."""
        config = self.checkpoint.config
        for source in (config, config.get("text_config") or {}):
            declared = source.get("dtype") or source.get("torch_dtype")
            if isinstance(declared, str):
                return declared
        floats = [
            np.dtype(self.checkpoint.tensors[name].dtype).name
            for name, kind in self.description.items()
            if kind == "FLOAT" and name in self.checkpoint.tensors and name.endswith(".weight")
        ]
        if not floats:
            raise CheckpointError(f"{self.checkpoint.path} does not tell the dtype of its model")
        most: str = max(set(floats), key=floats.count)
        return most

    @property
    def norm_extras(self) -> frozenset[str]:
        """Tensors that were added to smoothed norms and that no float model has."""
        tensors = self.checkpoint.tensors
        copies = {name for name in tensors if name.endswith((".module.weight", ".module.bias"))}
        added = {name.replace(".module.bias", ".bias") for name in copies} - copies
        if self._norms_have_biases(added):  # the last norm is smoothed in no model
            added = set()
        noted = self.description.get("metadata", {}).get(ADDED_NORM_BIAS, [])
        return frozenset(
            {*copies, *(name for name in {*added, *noted} if name.endswith(".bias"))}
            & tensors.keys()
        )

    def _norms_have_biases(self, smoothed: set[str]) -> bool:
        """Whether norms other than the smoothed ones have a bias, as those of the class then do."""
        tensors = self.checkpoint.tensors
        return any(
            bias in tensors and bias not in smoothed and not bias.endswith(".module.bias")
            for name, info in tensors.items()
            if len(info.shape) == 1 and self.description.get(name) == "FLOAT"
            for bias in [name.removesuffix("weight") + "bias"]
        )

    def tensor_names(self, layer: str) -> list[str]:
        """Return the full names of the tensors of a layer, of a sliced one with its slices."""
        if layer in self.slices:
            return [name for name in self.checkpoint.tensors if name.startswith(f"{layer}.")]
        return self._by_layer.get(layer, [])

    def tensors_of(self, layer: str) -> dict[str, np.ndarray]:
        """Return the tensors of a layer by their local names, without those of its cache."""
        return {
            name.rpartition(".")[2]: self.checkpoint.load(name)
            for name in self.tensor_names(layer)
            if name not in self.attention_tensors
        }

    def layer(self, name: str) -> QuantizedLinear:
        """Return a quantized layer.

        Raises
        ------
        FormatError
            A tensor of the layer is missing or has the wrong dtype or shape.
        """
        tensors = self.tensors_of(name)
        scheme = scheme_of(name, self.layers[name], tensors)
        return format_of(self.description).decode(name, scheme, tensors, self.model_dtype)

    def sliced(self, name: str) -> SlicedLinear:
        """Return a sliced layer.

        Raises
        ------
        FormatError
            As :meth:`layer`, and :func:`slim_core.tensor_parallel.read_sliced`.
        """
        slices = tuple(self.layer(slice_name(name, i)) for i in range(self.slices[name]))
        return read_sliced(name, slices, self.checkpoint.tensors, self.checkpoint.load)


def _quantized_layers(description: Mapping[str, Any]) -> dict[str, str]:
    layers: dict[str, str] = {}
    for tensor, kind in description.items():
        if not isinstance(kind, str) or not tensor.endswith(".weight") or kind == "FLOAT":
            continue
        if kind not in TYPE_PRIORITY:
            raise FormatError(
                f"{tensor} has the type {kind!r:.80}, which slim does not read",
                hint=REFUSED_TYPES.get(kind),
            )
        if not tensor.endswith(".module.weight"):
            layers[tensor.removesuffix(".weight")] = kind
    return layers


def find_description(directory: Path) -> Path:
    """Return the description file of a quantized checkpoint.

    Raises
    ------
    CheckpointError
        There is none, or there are several and none has the fixed name.
    """
    if (directory / DESCRIPTION_FILE).is_file():
        return directory / DESCRIPTION_FILE
    found = sorted(directory.glob("quant_model_description*.json")) if directory.is_dir() else []
    if len(found) != 1:
        what = "no description" if not found else f"{len(found)} descriptions"
        raise CheckpointError(f"{directory} holds {what} of a quantized model ({DESCRIPTION_FILE})")
    return found[0]


def is_quantized(path: PathLike) -> bool:
    """Whether a directory holds a description of a quantized model."""
    root = as_path("path", path)
    return root.is_dir() and any(root.glob("quant_model_description*.json"))


def format_of(description: Mapping[str, Any]) -> Format:
    """Return the layout of a checkpoint: only ``ascend_v1`` has a version."""
    packed = description.get("version", "0.0.0") != "0.0.0"
    return FORMATS["ascend_v1" if packed else "safe_tensor"]


def scheme_of(name: str, kind: str, tensors: Mapping[str, np.ndarray]) -> QuantScheme:
    """Return the scheme that a type name and the shapes of the tensors of a layer stand for."""
    scheme = QuantScheme.parse(kind.lower())
    if scheme.weight is not None and scheme.weight.scales is ScaleKind.E8M0:
        return scheme
    source = _SCALE_SOURCES.get(kind, "weight_scale")
    scale = tensors.get(SECOND_SCALE, tensors.get(source))
    if scale is None or not 1 <= scale.ndim <= 2:
        raise FormatError(f"{name} has no {source} of one or two dimensions")
    rows, columns = stored_shape(name, scheme, tensors, packed=False)
    text = kind.lower()
    if kind == "NF4":
        return QuantScheme.parse(f"{text}_b{rows * columns // max(scale.size, 1)}")
    if scale.shape == (1,):
        text += "_tensor"
    elif scale.ndim == 2 and (scale.shape[1] > 1 or SECOND_SCALE in tensors):
        text += f"_g{columns // scale.shape[1]}"  # of groups the columns are never packed
    offset = tensors.get("weight_offset")
    if offset is not None and offset.any():
        text += "_asym"
    return QuantScheme.parse(text)

"""What an on-disk format is: pure functions between a layer and its local tensors.

A format never sees a module or a file.  It turns one :class:`~slim_core.layers.QuantizedLinear`
into ``{local name: numpy array}`` and back, names the type of every tensor for the description
file, and says how the files are called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme

Tensors = dict[str, np.ndarray]


class Format(ABC):
    """One on-disk layout of quantized checkpoints."""

    name: ClassVar[str]

    @abstractmethod
    def unsupported(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Return why a layer of this scheme and weight shape cannot be held, or None if it can."""

    @abstractmethod
    def nbytes(
        self, name: str, scheme: QuantScheme, shape: tuple[int, int], model_dtype: str
    ) -> int:
        """Return the bytes of a quantized layer in this format, without its float bias."""

    @abstractmethod
    def encode(self, layer: QuantizedLinear) -> Tensors:
        """Return the tensors of a layer by their local names (``weight``, ``weight_scale``)."""

    @abstractmethod
    def decode(
        self, name: str, scheme: QuantScheme, tensors: Mapping[str, np.ndarray], model_dtype: str
    ) -> QuantizedLinear:
        """Return the layer whose :meth:`encode` gave these tensors.

        Raises
        ------
        FormatError
            A tensor is missing or has the wrong dtype or shape.
        """

    @abstractmethod
    def weight_file(self, model_type: str) -> str:
        """Return the name of the weight file without ``.safetensors``."""

    def description_file(self, model_type: str) -> str | None:
        """Return the name of the description file, None if the format has none."""
        return None

    def description(self, model_type: str, group_size: int) -> dict[str, Any]:
        """Return the keys of the description that are not names of tensors."""
        return {}

    def config_changes(self, model_type: str, layers: Mapping[str, QuantScheme]) -> dict[str, Any]:
        """Return the top-level keys of ``config.json`` that readers of this format look for.

        Parameters
        ----------
        layers : mapping
            Scheme of every linear layer of the blocks by its name, float ones included.

        Raises
        ------
        FormatError
            The format cannot hold these schemes beside one another.
        """
        return {}

    def type_name(self, ascend_type: str) -> str:
        """Return what this format calls an Ascend type."""
        return ascend_type

    def entries(self, layer: QuantizedLinear, tensors: Tensors) -> dict[str, str]:
        """Return the type of each local tensor for the description."""
        kind = self.type_name(layer.scheme.ascend_type)
        return {local: "FLOAT" if local == "bias" else kind for local in tensors}


def to_numpy(array: Any, dtype: Any = None) -> np.ndarray:
    """Return a numpy array of a numpy or torch array, bfloat16 included, optionally converted."""
    if not isinstance(array, np.ndarray):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":  # numpy cannot take it, float32 holds it exactly
            array = array.float().numpy().astype(ml_dtypes.bfloat16)
        else:
            array = array.numpy()
    converted: np.ndarray = array if dtype is None else array.astype(dtype, copy=False)
    return converted

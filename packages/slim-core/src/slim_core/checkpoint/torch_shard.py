"""A ``.bin`` file of torch as a weight file: names, shapes, and tensors read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slim_core.checkpoint.tensor_info import TensorInfo
from slim_core.errors import CheckpointError
from slim_core.files import check_input_file
from slim_core.torch_pickles import LazyTensor, read_torch_file


class TorchShard:
    """The state dictionary in a file of ``torch.save``.

    Raises
    ------
    CheckpointError
        The file is damaged, holds something else than a dictionary of tensors, or its pickle uses
        a global that is not data; nothing in it is ever run.
    FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    """

    def __init__(self, path: Path) -> None:
        self.path = check_input_file(path)
        state = _state_dict(path, read_torch_file(self.path, CheckpointError))
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._lazy: dict[str, LazyTensor] = {}
        first: dict[Any, str] = {}
        by_place = sorted(state.items(), key=lambda item: (item[1].storage.start, item[1].offset))
        for name, tensor in by_place:
            self.tensors[name] = TensorInfo(name, tensor.dtype, tensor.shape, path)
            self._lazy[name] = tensor
            if first.setdefault(tensor.place, name) != name:
                self.aliases[name] = first[tensor.place]

    def load(self, name: str) -> np.ndarray:
        """Read one tensor into an array of its own."""
        return self._lazy[name].load()

    def will_load(self, name: str) -> None:
        """Do nothing: these files are read when a tensor is loaded."""


def _state_dict(path: Path, root: Any) -> dict[str, LazyTensor]:
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} holds a {type(root).__name__}, not a dictionary of tensors")
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise CheckpointError(
                f"{path}: {name!r:.80} is not a tensor but a {type(value).__name__}",
                hint="save the state dictionary of the model alone",
            )
    return dict(root)

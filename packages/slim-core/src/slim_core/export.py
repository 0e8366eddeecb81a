"""Writing a quantized checkpoint: layers through a format into shards, then the description."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from slim_core.attention_types import announcements
from slim_core.checkpoint import ShardWriter
from slim_core.files import write_json
from slim_core.formats import FloatFormat, Format
from slim_core.layers import QuantizedLinear


class CheckpointExport:
    """Takes layers and float tensors one by one; the description is written last.

    Parameters
    ----------
    directory : Path
        Must exist.
    form : Format
    model_type : str
        Type name of the model as a whole, for file names and the description.
    group_size : int
        For the description, 0 if no layer is grouped.
    weight_file, description_file : str, optional
        In the place of the names of the format; without and with suffix.
    max_shard_bytes : int, optional
        Size from which on a new shard is begun; one file if None.

    Notes
    -----
    Nothing has its final name before :meth:`close`; leaving the ``with`` block by an exception
    removes what was written.
    """

    def __init__(
        self,
        directory: Path,
        form: Format,
        *,
        model_type: str,
        group_size: int = 0,
        weight_file: str | None = None,
        description_file: str | None = None,
        max_shard_bytes: int | None = None,
    ) -> None:
        self._directory = directory
        self._form = form
        self._description_file = description_file or form.description_file(model_type)
        self._description: dict[str, Any] = form.description(model_type, group_size)
        self._types: dict[str, str] = {}
        prefix = weight_file or form.weight_file(model_type)
        self._writer = ShardWriter(directory, prefix, max_shard_bytes=max_shard_bytes)

    def add_layer(self, layer: QuantizedLinear, *, transposed: bool = False) -> int:
        """Write the tensors of a quantized layer and return their bytes.

        Parameters
        ----------
        transposed : bool
            Whether the float checkpoint stores the weight as (in, out), as that of GPT-2 does.
            Quantized weights are (out, in) all the same, as engines read them.
        """
        tensors = self._form.encode(layer)
        if transposed and isinstance(self._form, FloatFormat):
            tensors["weight"] = np.ascontiguousarray(tensors["weight"].T)
        types = self._form.entries(layer, tensors)
        for local, array in tensors.items():
            self._add(f"{layer.name}.{local}", array, types[local])
        return sum(array.nbytes for array in tensors.values())

    def add_float(self, name: str, array: np.ndarray, kind: str = "FLOAT") -> int:
        """Write a tensor that is not quantized and return its bytes."""
        self._add(name, array, kind)
        return array.nbytes

    def describe(self, key: str, value: Any) -> None:
        """Add a key that is not a tensor to the description."""
        self._description[key] = value

    def note(self, key: str, value: Any) -> None:
        """Add a key to the metadata of the description."""
        self.describe("metadata", {**self._description.get("metadata", {}), key: value})

    def finish(self) -> None:
        """Complete the weight files; no tensor can be added any more.

        A state of then can be taken up even while :meth:`close` gives the files their names.
        """
        self._writer.finish()

    def save_state(self, sync: Callable[[int], object] = os.fsync) -> dict[str, Any]:
        """Flush everything to disk and return JSON values for :meth:`load_state`.

        Parameters
        ----------
        sync : callable
            Flushes a file, given its descriptor, to disk, or sees to it later: the state holds
            from then on.
        """
        return {
            "description": dict(self._description),
            "types": dict(self._types),
            "writer": self._writer.save_state(sync),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`save_state` was called; nothing must have been added yet.

        Raises
        ------
        OSError, CheckpointError
            A temporary file is missing or shorter than it was.
        """
        self._writer = ShardWriter.from_state(self._directory, state["writer"])
        self._description = dict(state["description"])
        self._types = dict(state["types"])

    def close(self) -> None:
        """Give the weight files their names and write the description."""
        self._writer.close()
        if self._description_file is not None:
            said = self._description | announcements(self._types.values())
            write_json(self._directory / self._description_file, said | self._types)

    def __enter__(self) -> CheckpointExport:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self._writer.__exit__(kind, error, trace)

    def _add(self, name: str, array: np.ndarray, kind: str) -> None:
        self._writer.add(name, array)
        self._types[name] = kind


class NoExport(CheckpointExport):
    """Takes everything and writes nothing: for processes that leave writing to another one."""

    def __init__(self) -> None:
        """Take nothing: there is no directory and no format."""

    def add_layer(self, layer: QuantizedLinear, *, transposed: bool = False) -> int:
        """Return 0."""
        return 0

    def add_float(self, name: str, array: np.ndarray, kind: str = "FLOAT") -> int:
        """Return 0."""
        return 0

    def describe(self, key: str, value: Any) -> None:
        """Drop the key."""

    def note(self, key: str, value: Any) -> None:
        """Drop the key."""

    def finish(self) -> None:
        """Have nothing to complete."""

    def save_state(self, sync: Callable[[int], object] = os.fsync) -> dict[str, Any]:
        """Return nothing to go on from."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Have nothing to go on from."""

    def close(self) -> None:
        """Have nothing to complete."""

    def __enter__(self) -> NoExport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Have nothing to remove."""

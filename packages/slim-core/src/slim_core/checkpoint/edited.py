"""A checkpoint some of whose tensors are other than those in its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from slim_core.checkpoint.reader import Checkpoint

Edit = Callable[[np.ndarray], np.ndarray]


class EditedCheckpoint(Checkpoint):
    """Applies edits as tensors are loaded; nothing is held in memory or written.

    Parameters
    ----------
    base : Checkpoint
    edits : mapping of str to callable
        By the name of the tensor: what is loaded to what it becomes, of the same shape.  The
        result may have more precision than ``tensors`` says; who stores it rounds it.
    copies : mapping of str to str
        Names of further tensors, each with that of the stored tensor that it is a copy of.
    config_changes : mapping, optional
        Top-level keys of ``config`` that are other than in the file.
    """

    def __init__(
        self,
        base: Checkpoint,
        edits: Mapping[str, Edit],
        copies: Mapping[str, str] | None = None,
        config_changes: Mapping[str, Any] | None = None,
    ) -> None:
        self._base = base
        self._edits = dict(edits)
        self._copies = dict(copies or {})
        self.path = base.path
        self.config = base.config | dict(config_changes or {})
        self.aliases = base.aliases
        added = {name: replace(base.tensors[of], name=name) for name, of in self._copies.items()}
        self.tensors = MappingProxyType({**base.tensors, **added})

    def load(self, name: str) -> np.ndarray:
        """Read one tensor and edit it (:meth:`Checkpoint.load`)."""
        array = self._base.load(self._copies.get(name, name))
        edit = self._edits.get(name)
        return array if edit is None else edit(array)

    def will_load(self, names: Iterable[str]) -> None:
        """Let the system read tensors ahead (:meth:`Checkpoint.will_load`)."""
        self._base.will_load(self._copies.get(name, name) for name in names)

    def iter_shards(self) -> Iterator[tuple[Path, list[str]]]:
        """Yield each weight file with its tensors; a copy comes with the tensor it is one of."""
        for file, names in self._base.iter_shards():
            yield file, names + [name for name, of in self._copies.items() if of in names]

    def side_files(self) -> list[Path]:
        """Return what :meth:`Checkpoint.side_files` of the base does."""
        return self._base.side_files()

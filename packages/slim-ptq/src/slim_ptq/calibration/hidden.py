"""The hidden states between two decoder blocks: in memory, or on disk above a limit.

Three files take turns: one to read the inputs of a block from, one to write its outputs to, and
one with the inputs of the block before, to which an interrupted run goes back as long as the state
after that block is on its way to disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from slim_core.errors import CheckpointError
from slim_core.files import read_into

_FILES = 3


class HiddenStates:
    """One tensor a batch of calibration data, replaced block by block.

    Parameters
    ----------
    folder : Path, optional
        Where the files go; without it everything stays in memory.
    limit : int
        Bytes up to which the tensors are held in memory.
    state : mapping, optional
        Of :meth:`save_state`: the tensors in the files count, not those that are appended.
    name : str
        First part of the names of the files.
    """

    def __init__(
        self,
        folder: Path | None = None,
        limit: int = 0,
        state: Mapping[str, Any] | None = None,
        name: str = "hidden",
    ) -> None:
        self._folder = folder
        self._name = name
        self._limit = limit
        self._state = state
        self._current = 0 if state is None else int(state["current"])  # the file of the inputs
        self._like: list[torch.Tensor] = []
        self._held: list[torch.Tensor] | None = []
        self._next: list[torch.Tensor] = []
        self._device = torch.device("cpu")

    def append(self, tensor: torch.Tensor) -> None:
        """Add the input of the first block for one more batch."""
        self._device = tensor.device
        self._like.append(torch.empty_like(tensor, device="meta"))
        if self._held is None:
            if self._state is None:
                self._write(self._current, len(self._like) - 1, tensor)
            return
        self._held.append(tensor)
        self._next.append(tensor)
        if self._folder is not None and self.nbytes > self._limit:
            held, self._held, self._next = self._held, None, []
            for index, part in enumerate(held if self._state is None else ()):
                self._write(self._current, index, part)

    def restore(self) -> None:
        """Take the tensors from the files once all have been appended.

        Raises
        ------
        CheckpointError
            The file is not that of these tensors.
        """
        assert self._state is not None
        path = self._path(self._current)
        size = path.stat().st_size if path.exists() else 0
        if self._state["nbytes"] != self.nbytes or size < self.nbytes:
            raise CheckpointError(f"{path} does not hold the {self.nbytes} bytes that were saved")
        if self._held is not None:
            self._held = [self._read(index, self._current) for index in range(len(self))]
            self._next = list(self._held)

    def __len__(self) -> int:
        return len(self._like)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._held is not None:
            return self._held[index]
        return self._read(index, self._current)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._like)

    @property
    def is_resumed(self) -> bool:
        """Whether the tensors of a state are to be taken up."""
        return self._state is not None

    @property
    def on_disk(self) -> bool:
        """Whether the tensors are on disk."""
        return self._held is None

    def put(self, index: int, tensor: torch.Tensor) -> None:
        """Take the output of a block for a batch; it becomes visible with :meth:`advance`."""
        if self._held is not None:
            self._next[index] = tensor
        else:
            self._write(self._following, index, tensor)

    def replace(self, index: int, tensor: torch.Tensor) -> None:
        """Take the output of a block for a batch whose input is not looked at again.

        Unlike after :meth:`put`, the memory of the input is free at once.
        """
        self.put(index, tensor)
        if self._held is not None:
            self._held[index] = tensor

    def output(self, index: int) -> torch.Tensor:
        """Return what was put for a batch and is not visible yet."""
        if self._held is not None:
            return self._next[index]
        return self._read(index, self._following)

    def advance(self) -> None:
        """Make the outputs the inputs of the next block."""
        if self._held is not None:
            self._held = self._next
            self._next = list(self._held)
        else:
            self._current = self._following

    def save_state(self, sync: Callable[[int], object] = os.fsync) -> dict[str, Any]:
        """Put the tensors on disk and return JSON values, the ``state`` to go on from.

        A state stays good until the second one after it is saved.

        Parameters
        ----------
        sync : callable
            Flushes a file, given its descriptor, to disk, or sees to it later: the state holds
            from then on.
        """
        if self._folder is None:
            raise CheckpointError("hidden states without a folder cannot be saved")
        if self._held is not None:
            self._current = self._following
            for index, tensor in enumerate(self._held):
                self._write(self._current, index, tensor)
        with self._open(self._current) as stream:
            sync(stream.fileno())
        return {"current": self._current, "nbytes": self.nbytes}

    def remove_files(self) -> None:
        """Remove the files; nothing can be read afterwards."""
        for number in range(_FILES) if self._folder is not None else ():
            self._path(number).unlink(missing_ok=True)

    @property
    def _following(self) -> int:
        """Number of the file of the outputs."""
        return (self._current + 1) % _FILES

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}.{number}.bin"

    def _open(self, number: int) -> IO[bytes]:
        descriptor = os.open(self._path(number), os.O_RDWR | os.O_CREAT, 0o600)
        return os.fdopen(descriptor, "r+b", buffering=0)

    def _start(self, index: int) -> int:
        return sum(tensor.nbytes for tensor in self._like[:index])

    def _read(self, index: int, number: int) -> torch.Tensor:
        tensor = torch.empty_like(self._like[index], device="cpu")
        view = tensor.view(-1).view(torch.uint8).numpy().data
        read_into(self._path(number), self._start(index), view)
        return tensor.to(self._device)

    def _write(self, number: int, index: int, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        with self._open(number) as stream:
            stream.seek(self._start(index))
            while data:
                data = data[stream.write(data) :]

"""Several processes on one job: calibration data and weight work are shared out among them.

The processes are started by ``torchrun``, or by anything else that sets the environment variables
``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from slim_core.errors import DeviceError

T = TypeVar("T")

_CPU = torch.device("cpu")
_met: list[int] = []  # the numbers of this process in the jobs that it has joined
_PATIENCE = timedelta(days=7)  # one process may evaluate for hours; torchrun ends the others

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


class Mergeable(Protocol):
    """Statistics of a part of the data."""

    def merge(self, other: Any) -> None:
        """Take in the statistics of a later part."""


M = TypeVar("M", bound=Mergeable)


@dataclass(frozen=True)
class Team:
    """The processes of a job, seen from one of them; a lone process is a team of one.

    Parameters
    ----------
    rank : int
        Number of this process; process 0 reads the journal and writes the output.
    size : int
        Number of processes.
    device : torch.device
        Where tensors arrive that were on the device of another process; others stay on the CPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in every process."""
        if self.size == 1:
            return [value]
        found: list[bytes | None] = [None] * self.size
        dist.all_gather_object(found, _packed(value))
        return [self._unpacked(part) for part in found]

    def collect(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in the first process; else nothing."""
        if self.size == 1:
            return [value]
        found: list[bytes | None] | None = [None] * self.size if self.is_first else None
        dist.gather_object(_packed(value), found)
        return [] if found is None else [self._unpacked(part) for part in found]

    def from_first(self, value: T | None) -> T:
        """Return in every process the value of the first one."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        held = [_packed(value) if self.is_first else None]
        dist.broadcast_object_list(held)
        first: T = self._unpacked(held[0])
        return first

    def merged(self, statistics: M) -> M:
        """Return in every process the statistics of all of them, in the order of the data."""
        first, *others = self.gather(statistics)
        for other in others:
            first.merge(other)
        return first

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return in every process, on its device, the sum of the tensors of all of them.

        The tensor itself may be lost.
        """
        if self.size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def share(self, costs: Mapping[str, int]) -> list[str]:
        """Return the keys whose work falls to this process.

        Parameters
        ----------
        costs : mapping of str to int
            Of each piece of work, the same in all processes.
        """
        loads = [0] * self.size
        mine = []
        for key in sorted(costs, key=lambda name: (-costs[name], name)):
            rank = loads.index(min(loads))
            loads[rank] += costs[key]
            if rank == self.rank:
                mine.append(key)
        return mine

    def _unpacked(self, packed: bytes | None) -> Any:
        assert packed is not None  # narrowing: torch.distributed has filled it
        return _Unpacker(packed, self.device).load()


class _Packer(pickle.Pickler):
    """Lets tensors of a device travel as they are on the CPU."""

    def persistent_id(self, value: Any) -> Any:
        elsewhere = isinstance(value, torch.Tensor) and value.device.type != "cpu"
        return value.detach().cpu() if elsewhere else None


class _Unpacker(pickle.Unpickler):
    """Puts them on the device of the process that they have come to."""

    def __init__(self, packed: bytes, device: torch.device) -> None:
        super().__init__(io.BytesIO(packed))
        self._device = device

    def persistent_load(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)


def _packed(value: Any) -> bytes:
    stream = io.BytesIO()
    _Packer(stream).dump(value)
    return stream.getvalue()


@contextlib.contextmanager
def team_of_environment(device: torch.device) -> Iterator[Team]:
    """Join the processes that the environment tells of while the context is open.

    Parameters
    ----------
    device : torch.device
        Of this process: decides how tensors travel.

    Raises
    ------
    DeviceError
        The environment is incomplete, or the processes do not find one another.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    if dist.is_initialized():  # by the program that calls
        yield Team(dist.get_rank(), dist.get_world_size(), device)
        return
    try:
        dist.init_process_group(_BACKENDS[device.type], timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise DeviceError(f"{size} processes cannot join: {error}") from error
    _met.append(dist.get_rank())
    try:
        yield Team(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def own_rank() -> int | None:
    """Return the number of this process in the job that it has joined, None before that."""
    return _met[-1] if _met else None


def own_device(name: str) -> str:
    """Return the device of this process: ``cuda`` or ``npu`` with the local number of it."""
    local = os.environ.get("LOCAL_RANK")
    return f"{name}:{local}" if local is not None and name in ("cuda", "npu") else name

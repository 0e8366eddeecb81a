"""Registries: named implementations of one idea."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from slim_core.validate import check_choice

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named objects; a duplicate name is an error, an unknown one names its neighbours.

    Parameters
    ----------
    kind : str
        What the objects are, for messages: ``"format"``, ``"method"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate an object to enter it under ``name``."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise KeyError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        return self._entries[check_choice(self.kind, name, self._entries)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

"""A pickle reader that can build nothing but data.

A pickle is a program: it names Python globals and calls them.  Here every global is looked up in a
table of the caller's own stand-ins, and anything else is refused by name, before it is imported.
No real class is ever handed out, so neither calling nor changing one is possible.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar, NoReturn

from slim_core.errors import CheckpointError, SlimError

Globals = Mapping[tuple[str, str], Any]

_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
_SMALL_READ = 1 << 16


class Opaque:
    """Stands for a global: it may be passed on, called if it has a function, and no more."""

    __slots__ = ("function", "value")

    def __init__(self, *, value: Any = None, function: Callable[..., Any] | None = None) -> None:
        self.value = value
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call the stand-in."""
        if self.function is None:
            raise TypeError("this global cannot be called")
        return self.function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("the state of a global cannot be set")


class PlainDict(dict[Any, Any]):
    """What a pickled OrderedDict becomes; attributes set on it are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes."""


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise TypeError("_codecs.encode of something other than latin1 text")
    return text.encode("latin1")


_EMPTY_BYTES = Opaque(function=lambda: b"")

SAFE_GLOBALS: Globals = {
    ("collections", "OrderedDict"): Opaque(function=PlainDict),
    # How protocols up to 2 write bytes.
    ("_codecs", "encode"): Opaque(function=_encode),
    ("builtins", "bytes"): _EMPTY_BYTES,
    ("__builtin__", "bytes"): _EMPTY_BYTES,
}


def restricted_load(
    stream: IO[bytes],
    allowed: Globals,
    *,
    source: str,
    refuse: type[SlimError],
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle.

    Parameters
    ----------
    stream : binary file
        Left behind the end of the pickle.
    allowed : mapping of (module, name) to object
        Stand-ins of the globals that may occur.
    source : str
        Name of the file, for messages.
    refuse : type of SlimError
        Raised for any other global.
    persistent_load : callable, optional
        Resolves persistent ids; without it they are an error.

    Raises
    ------
    CheckpointError
        The pickle is damaged.
    """
    try:
        return _Unpickler(stream, allowed, source, refuse, persistent_load).load()
    except SlimError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{source} holds a damaged pickle: {error}") from error


class _Unpickler(pickle._Unpickler):
    # The implementation in C reserves memory for whatever memo index a pickle names, many
    # gigabytes for one byte of damage; this one, in Python, does not.
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        stream: IO[bytes],
        allowed: Globals,
        source: str,
        refuse: type[SlimError],
        resolve: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(_Bounded(stream))
        self._allowed = allowed
        self._source = source
        self._refuse = refuse
        self._resolve = resolve

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        raise self._refuse(
            f"{self._source} was not loaded: its pickle uses {module}.{name}, which is not data",
            hint="a pickle can run any program; do not load this file with other tools "
            "unless you trust its author",
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._resolve is None:
            raise pickle.UnpicklingError("unexpected persistent id")
        return self._resolve(pid)

    def _load_bytearray8(self) -> None:
        # As bytes: the original allocates the announced length before it reads.
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8


class _Bounded:
    """A stream that does not try to read more than there is."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.readline = stream.readline
        place = stream.tell()
        self._end = stream.seek(0, os.SEEK_END)
        stream.seek(place)

    def read(self, count: int) -> bytes:
        if count > _SMALL_READ:
            count = min(count, self._end - self._stream.tell())
        return self._stream.read(count)

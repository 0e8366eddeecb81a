"""Names of devices, without any framework: ``cpu``, ``cuda:1``, ``npu:0``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slim_core.errors import InvalidValueError
from slim_core.validate import check_choice, check_int, check_type, did_you_mean

KINDS = ("cpu", "cuda", "npu")
_ALIASES = {"gpu": "cuda"}
_NAME = re.compile(r"(?P<kind>[a-z]+)(:(?P<index>0|[1-9]\d{0,3}))?")


@dataclass(frozen=True, slots=True)
class Device:
    """A processor.

    Parameters
    ----------
    kind : {"cpu", "cuda", "npu"}
    index : int, optional
        Which one of them; None is the current one.  A cpu has none.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        Another kind, a negative index, or the index of a cpu.
    """

    kind: str
    index: int | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if self.index is not None:
            check_int("index", self.index, low=0)
            if self.kind == "cpu":
                raise InvalidValueError(f"index must be None for a cpu, not {self.index}")

    @classmethod
    def parse(cls, name: str) -> Device:
        """Read a name; ``gpu`` means ``cuda``.

        Raises
        ------
        InvalidTypeError
            Not a str.
        InvalidValueError
            Not the name of a device.

        Examples
        --------
        >>> Device.parse("gpu:1")
        Device(kind='cuda', index=1)
        """
        match = _NAME.fullmatch(check_type("device", name, str))
        kind = match and _ALIASES.get(match["kind"], match["kind"])
        if match is None or kind not in KINDS or (kind == "cpu" and match["index"]):
            raise InvalidValueError(
                f"device must be cpu, cuda, npu or gpu, the last three optionally with an index "
                f"as in npu:0, not {name!r:.80}",
                hint=did_you_mean(name.partition(":")[0].strip().lower(), [*KINDS, *_ALIASES]),
            )
        return cls(kind, int(match["index"]) if match["index"] else None)

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

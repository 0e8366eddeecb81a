"""Rank tables: which layer gets which form and ranks, and their JSON file.

::

    {"version": 1, "layers": {"fc": {"kind": "linear", "shape": [512, 1600], "form": "factors",
                                     "ranks": [192], "bias": true}}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.files import MODE_SHARED, PathLike, check_input_file, write_json
from slim_core.validate import check_choice, check_int, check_type
from slim_lowrank.ranks import form_params

Form: TypeAlias = Literal["factors", "pivot", "out", "in", "spatial", "tucker2"]
MATRIX_FORMS: tuple[Form, ...] = ("factors", "pivot")
CONV_FORMS: tuple[Form, ...] = ("out", "in", "spatial", "tucker2")
VERSION = 1
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerRanks:
    """What becomes of one layer.

    Parameters
    ----------
    name : str
        First ``named_modules`` name.
    kind : str
        Kind of the layer, ``linear``, ``conv2d`` and so on.
    shape : tuple of int
        Shape of the dense weight, ``(out, in, *kernel)``; of an embedding ``(entries, width)``.
    form : str
        One of ``factors``, ``pivot`` (matrices), ``out``, ``in``, ``spatial``, ``tucker2``.
    ranks : tuple of int
        One rank, or ``(out, in)`` for ``tucker2``.
    bias : bool
        Whether the last factor has a bias.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    form: Form
    ranks: tuple[int, ...]
    bias: bool

    def __post_init__(self) -> None:
        matrix = len(self.shape) == 2
        check_choice(f"form of layer {self.name!r}", self.form, MATRIX_FORMS + CONV_FORMS)
        if (self.form in MATRIX_FORMS) != matrix:
            raise InvalidValueError(
                f"layer {self.name!r} of shape {self.shape} cannot have the form {self.form!r}"
            )
        if self.form == "spatial" and (len(self.shape) != 4 or min(self.shape[2:]) < 2):
            raise InvalidValueError(
                f"layer {self.name!r}: the form 'spatial' needs a kernel of at least 2x2"
            )
        count = 2 if self.form == "tucker2" else 1
        if len(self.ranks) != count:
            raise InvalidValueError(
                f"layer {self.name!r} needs {count} rank(s) for {self.form!r}, not {self.ranks}"
            )
        for rank, limit in zip(self.ranks, rank_limits(self.form, self.shape), strict=True):
            check_int(f"rank of layer {self.name!r}", rank, low=1, high=limit)

    @property
    def params(self) -> int:
        """Number of weights after decomposition, bias not counted."""
        return form_params(self.form, self.ranks, self.shape)

    @property
    def dense_params(self) -> int:
        """Number of weights before."""
        return math.prod(self.shape)


def rank_limits(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the largest meaningful ranks of a form."""
    out, inp, taps = shape[0], shape[1], math.prod(shape[2:])
    if form == "tucker2":
        return out, inp
    if form == "in":
        return (min(inp, out * taps),)
    if form == "spatial":
        return (min(inp * shape[2], out * shape[3]),)
    limit = min(out, inp * taps)
    return (limit - 1 if form == "pivot" and limit == out else limit,)


Table: TypeAlias = "dict[str, LayerRanks]"


def save_table(path: PathLike, table: Mapping[str, LayerRanks]) -> None:
    """Write a rank table as JSON, atomically, mode 0640."""
    write_json(path, to_json(table.values()), MODE_SHARED)


def load_table(path: PathLike) -> Table:
    """Read a rank table.

    Raises
    ------
    FileNotFoundError, FileSecurityError
        As :func:`slim_core.files.check_input_file`.
    InvalidTypeError, InvalidValueError
        The file is not such a table, naming the layer at fault.
    """
    file = check_input_file(path, max_bytes=MAX_BYTES)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidValueError(f"{file} is not JSON: {error}") from error
    return from_json(value)


def to_json(layers: Iterable[LayerRanks]) -> dict[str, Any]:
    """Return the JSON value of a table."""
    return {
        "version": VERSION,
        "layers": {
            layer.name: {
                "kind": layer.kind,
                "shape": list(layer.shape),
                "form": layer.form,
                "ranks": list(layer.ranks),
                "bias": layer.bias,
            }
            for layer in layers
        },
    }


def from_json(value: Any) -> Table:
    """Return the table of a JSON value; errors as in :func:`load_table`."""
    if not isinstance(value, dict) or not isinstance(value.get("layers"), dict):
        raise InvalidValueError("a rank table must be a JSON object with 'version' and 'layers'")
    if value.get("version") != VERSION:
        raise InvalidValueError(f"a rank table of version {value.get('version')!r} is not known")
    return {name: _parse(name, entry) for name, entry in value["layers"].items()}


def _parse(name: str, entry: Any) -> LayerRanks:
    expected = {"kind", "shape", "form", "ranks", "bias"}
    if not isinstance(entry, dict) or entry.keys() != expected:
        raise InvalidValueError(
            f"layer {name!r} of the table must have the keys {sorted(expected)}"
        )
    for key in ("shape", "ranks"):
        if not isinstance(entry[key], list):
            raise InvalidTypeError(f"{key} of layer {name!r} must be a list of int")
        for item in entry[key]:
            check_int(f"{key} of layer {name!r}", item, low=1)
    return LayerRanks(
        name,
        check_type(f"kind of layer {name!r}", entry["kind"], str),
        tuple(entry["shape"]),
        entry["form"],
        tuple(entry["ranks"]),
        check_type(f"bias of layer {name!r}", entry["bias"], bool),
    )

"""From what a user asks for (ratio, rank, pair, "vbmf") to the ranks of one layer.

These are the rules of the compatible face, shared by every framework; they see shapes, and weights
only where VBMF has to look at them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.validate import check_int
from slim_lowrank import ranks
from slim_lowrank.factorize import Array
from slim_lowrank.tucker import unfold
from slim_lowrank.vbmf import vbmf_rank

Ranks: TypeAlias = "int | tuple[int, int]"
Request: TypeAlias = 'float | int | tuple[int, int] | Literal["vbmf"]'
VBMF: Literal["vbmf"] = "vbmf"


@dataclass(frozen=True)
class LayerShape:
    """What the rank rules need to know of a layer.

    Parameters
    ----------
    kind : str
        ``linear`` (weight ``(out, in)``), ``embedding`` (``(entries, width)``) or ``conv``
        (``(out, in, *kernel)``).
    shape : tuple of int
        Shape of the weight.
    """

    kind: Literal["linear", "embedding", "conv"]
    shape: tuple[int, ...]


def parse_request(name: str, value: Any) -> Request:
    """Check one value of a rank table given by a user.

    Parameters
    ----------
    name : str
        What errors call the value.
    value : float, int, str or pair of int
        A float within (0, 1) is a share of the layer's parameters; an int, or a whole float from 1
        on, a rank; ``"vbmf"`` in any case asks for the estimated rank; a pair is ``(out, in)``.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        Anything else.
    """
    if isinstance(value, str):
        if value.lower() != VBMF:
            raise InvalidValueError(f"{name} must be 'vbmf' if it is a str, not {value!r:.80}")
        return VBMF
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise InvalidValueError(f"{name} must be a pair (out, in), not of length {len(value)}")
        pair = [check_int(f"{name}[{index}]", item, low=1) for index, item in enumerate(value)]
        return pair[0], pair[1]
    if isinstance(value, float) and value >= 1 and value.is_integer():
        return int(value)
    if isinstance(value, float):
        return ranks.check_ratio(name, value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(
            f"{name} must be a float, an int, a pair of int or 'vbmf', not {type(value).__name__}"
        )
    return check_int(name, value, low=1)


def choose_ranks(
    layer: LayerShape, request: Request, divisor: int, weight: Callable[[], Array]
) -> Ranks | None:
    """Return the ranks of one layer on the grid of ``divisor``, or None if it stays dense.

    Parameters
    ----------
    layer : LayerShape
        The layer.
    request : Request
        As :func:`parse_request` returns it.
    divisor : int
        Ranks are rounded to its multiples by :func:`slim_lowrank.ranks.round_to`.
    weight : callable
        Gives the weight as an array; called for VBMF only.

    Returns
    -------
    int, tuple of int or None
        One rank for matrices, ``(out, in)`` for kernels; None where factors would be no smaller.
        Whether they are is judged before the ranks of a kernel are cut to its channel counts.
    """
    if layer.kind == "conv":
        return _conv_ranks(layer.shape, request, divisor, weight)
    rows, columns = layer.shape
    if isinstance(request, str):
        wanted = vbmf_rank(weight())
    elif isinstance(request, tuple):
        wanted = max(request)
    elif isinstance(request, float):
        wanted = ranks.matrix_rank(request, rows, columns)
    else:
        wanted = request
    rank = ranks.round_to(max(wanted, 1), divisor)
    return rank if ranks.matrix_pays(rank, rows, columns) else None


def _conv_ranks(
    shape: tuple[int, ...], request: Request, divisor: int, weight: Callable[[], Array]
) -> tuple[int, int] | None:
    wanted: tuple[float, float]
    if isinstance(request, str):
        kernel = np.asarray(weight())
        wanted = vbmf_rank(unfold(kernel, 0)), vbmf_rank(unfold(kernel, 1))
    elif isinstance(request, tuple):
        wanted = request
    elif isinstance(request, float):
        wanted = (ranks.conv_rank(request, shape),) * 2
    else:
        wanted = request, request
    pair = ranks.round_to(wanted[0], divisor), ranks.round_to(wanted[1], divisor)
    return ranks.clamp_conv_ranks(pair, shape) if ranks.conv_pays(pair, shape) else None


def check_ranks(name: str, layer: LayerShape, value: Any) -> Ranks:
    """Require ranks that fit a layer, as they stand in a table read from a file.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        Naming the layer: not int or a pair of int, or beyond what the shape allows.
    """
    if layer.kind != "conv":
        if isinstance(value, (list, tuple)):
            value = max(check_pair(name, value))
        return check_int(f"rank of layer {name!r}", value, low=1, high=min(layer.shape))
    pair = check_pair(name, value)
    for side, rank, channels in zip(("out", "in"), pair, layer.shape, strict=False):
        check_int(f"{side} rank of layer {name!r}", rank, low=1, high=channels)
    return pair


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """Require two ints; one int stands for both."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        first, second = (check_int(f"rank of layer {name!r}", item, low=1) for item in value)
        return first, second
    if isinstance(value, (list, tuple)):
        raise InvalidValueError(f"ranks of layer {name!r} must be a pair, not {value!r:.80}")
    single = check_int(f"rank of layer {name!r}", value, low=1)
    return single, single

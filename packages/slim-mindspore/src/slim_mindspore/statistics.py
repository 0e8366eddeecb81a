"""What calibration learns about the inputs of cells."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from slim_core.errors import CalibrationError
from slim_core.numerics import check_finite
from slim_mindspore.framework import Tensor, ms, nn, ops
from slim_mindspore.modes import pynative

KEPT_ROWS = 512
Forward = Callable[[Any, np.ndarray], Any]


class InputStatistics:
    """Statistics of the inputs of one cell over all calibration tokens.

    Parameters
    ----------
    name : str
        Of the cell, for errors.
    rows : bool
        Keep up to 512 tokens.
    hessian : bool
        Sum up ``x x^T``.

    Attributes
    ----------
    tokens : int
    low, high : numpy.ndarray, float32, shape (channels,)
        Smallest and largest value of each channel.
    magnitude : numpy.ndarray, float64, shape (channels,)
        Sum of magnitudes.
    gram : numpy.ndarray, float64, shape (channels, channels), or None
    """

    def __init__(self, name: str, *, rows: bool = False, hessian: bool = False) -> None:
        self._name = name
        self._keep_rows, self._keep_gram = rows, hessian
        self._rows: list[np.ndarray] = []
        self.tokens = 0
        self.low = self.high = np.zeros(0, np.float32)
        self.magnitude = np.zeros(0)
        self.gram: np.ndarray | None = None

    def update(self, x: np.ndarray) -> None:
        """Take more inputs, float32, shape (tokens, channels).

        Raises
        ------
        NumericalError
            They hold NaN or infinity.
        """
        check_finite(self._name, "input", x)
        low, high = x.min(axis=0), x.max(axis=0)
        magnitude = np.abs(x).sum(axis=0, dtype=np.float64)
        if self.tokens:
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
            magnitude = magnitude + self.magnitude
        self.low, self.high, self.magnitude = low, high, magnitude
        self.tokens += len(x)
        if self._keep_gram:
            gram = (x.T @ x).astype(np.float64)
            self.gram = gram if self.gram is None else self.gram + gram
        if self._keep_rows:
            missing = KEPT_ROWS - sum(len(rows) for rows in self._rows)
            if missing > 0:
                self._rows.append(x[:missing].copy())

    def forget_tokens(self) -> None:
        """Free what grows with the square of the channels or with the number of tokens."""
        self._rows, self.gram = [], None

    @property
    def peak(self) -> np.ndarray:
        """Largest magnitude of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def mean(self) -> np.ndarray:
        """Mean magnitude of each channel, float32."""
        return (self.magnitude / self.tokens).astype(np.float32)

    @property
    def rows(self) -> np.ndarray:
        """The tokens that were kept, shape (tokens, channels)."""
        return np.concatenate(self._rows)

    @property
    def hessian(self) -> np.ndarray:
        """Mean of ``2 x x^T`` over the tokens, float64."""
        if self.gram is None:
            raise CalibrationError(f"no products of the inputs of {self._name} were summed up")
        return self.gram * (2.0 / self.tokens)


def call_with_ids(network: Any, ids: np.ndarray) -> None:
    """Call a network with int32 ids; it may return its logits in a tuple, as MindFormers does."""
    output = network(Tensor(np.asarray(ids, np.int32), ms.int32))
    logits = output[0] if isinstance(output, (list, tuple)) else output
    logits.asnumpy()  # waits for the network


def collect(
    network: Any,
    cells: Mapping[str, Any],
    batches: Iterable[np.ndarray],
    *,
    forward: Forward | None = None,
    channels_from: Callable[[Any], int] | None = None,
    rows: bool = False,
    hessian: bool = False,
) -> dict[str, InputStatistics]:
    """Run a network and watch the inputs of some of its cells.

    Parameters
    ----------
    network : Cell
        Called with int32 ids (batch, length), in PyNative mode.
    cells : mapping of str to Cell
    batches : iterable of numpy.ndarray
        Token ids.
    forward : callable, optional
        ``forward(network, ids)`` runs a batch; :func:`call_with_ids` if None.
    channels_from : callable, optional
        Tells how many channels a cell's input has, counted over its last axes; the last axis alone
        if None.
    rows, hessian : bool
        As in :class:`InputStatistics`.

    Raises
    ------
    CalibrationError
        There are no batches, or a cell was never called.
    """
    statistics = {name: InputStatistics(name, rows=rows, hessian=hessian) for name in cells}
    run = forward or call_with_ids
    count = 0
    with pynative(), contextlib.ExitStack() as hooks:
        for name, cell in cells.items():
            width = channels_from(cell) if channels_from else None
            hooks.callback(watch(cell, statistics[name].update, width).remove)
        for batch in batches:
            run(network, batch)
            count += 1
    if not count:
        raise CalibrationError("there is no calibration data")
    silent = [name for name, found in statistics.items() if not found.tokens]
    if silent:
        raise CalibrationError(
            f"the calibration data never reached {', '.join(silent[:5])}",
            hint="put cells that are never called into modules_to_not_convert",
        )
    return statistics


def watch(cell: Any, update: Callable[[np.ndarray], None], width: int | None = None) -> Any:
    """Let a cell report its inputs until the returned handle is removed (PyNative mode).

    ``update`` gets them as float32 of shape (tokens, channels).

    Channels are the last axis, or as many last axes as make up ``width``; the second axis of the
    input of a convolution.
    """

    def look(_: Any, inputs: Any) -> None:
        x = ops.cast(inputs[0], ms.float32).asnumpy()
        if isinstance(cell, nn.Conv2d):
            x = np.moveaxis(x, 1, -1)
        update(np.ascontiguousarray(x).reshape(-1, width or x.shape[-1]))

    return cell.register_forward_pre_hook(look)

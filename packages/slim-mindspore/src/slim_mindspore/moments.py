"""Second moments of what cells read, and of the gradients of a loss by what they give."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from slim_core.errors import CalibrationError, InvalidTypeError, InvalidValueError
from slim_core.numerics import check_finite
from slim_lowrank.trust import trusted_shrinkage
from slim_lowrank.whitening import GAMMA_DAMPING, SHRINKAGE, MatrixProblem, shrink
from slim_mindspore.framework import Tensor, ms, ops
from slim_mindspore.linears import FLOATS
from slim_mindspore.modes import pynative
from slim_mindspore.statistics import watch

Array = np.ndarray
Loss = Callable[[Any, Any], Any]
"""``loss(output, batch)`` gives the scalar loss of a batch."""


class LayerMoments:
    """Moments of one cell over all calibration positions, float64.

    Parameters
    ----------
    name : str
        Of the cell, for errors.

    Attributes
    ----------
    rows : int
        Positions seen.
    total : numpy.ndarray, shape (in,)
        Sum of the inputs.
    gram : numpy.ndarray, shape (in, in)
        Sum of ``x x^T``.
    gradients : numpy.ndarray, shape (out, out), or None
        Sum of ``g g^T``, ``g`` the gradient of the loss by an output.
    batches : int
        How many batches had gradients.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = self.batches = 0
        self.total: Array = np.zeros(0)
        self.gram: Array = np.zeros((0, 0))
        self.gradients: Array | None = None
        self._half: tuple[Array, int] | None = None

    def update(self, x: Array) -> None:
        """Take more inputs, float32, shape (positions, in)."""
        check_finite(self.name, "input", x)
        gram, total = (x.T @ x).astype(np.float64), x.sum(0, dtype=np.float64)
        self.gram = self.gram + gram if self.rows else gram
        self.total = self.total + total if self.rows else total
        self.rows += len(x)

    def update_gradients(self, g: Array) -> None:
        """Take the gradients of a batch, float32, shape (positions, out)."""
        check_finite(self.name, "gradient", g)
        # Gradients of a mean loss are small: their squares leave the range of float32.
        products = g.astype(np.float64).T @ g
        self.gradients = products if self.gradients is None else self.gradients + products
        self.batches += 1

    def halve(self) -> None:
        """Remember what has been seen so far as the part that the rest will judge."""
        self._half = (self.gram, self.rows) if self.rows else None

    @property
    def mean(self) -> Array:
        """Mean input, shape (in,)."""
        return self.total / self.rows

    def check_rank(self, rank: int) -> None:
        """Require more positions than a rank, else the factors would know the data by heart.

        Raises
        ------
        CalibrationError
            Names the cell.
        """
        if self.rows <= rank:
            raise CalibrationError(
                f"layer {self.name!r} saw {self.rows} positions, too few for rank {rank}",
                hint=f"calibrate with more than {rank} positions, better 4 per channel",
            )

    def problem(self, weight: Array, *, centred: bool) -> MatrixProblem:
        """Return a weight, shape (out, in), in the metric of what was seen.

        ``centred`` leaves the mean of the inputs out, for a cell whose bias makes up for it.
        """
        second = self.second(weight)
        if centred:
            second = second - np.outer(self.mean, self.mean)
        gamma = None
        if self.gradients is not None:
            gamma = shrink(self.gradients / self.batches, GAMMA_DAMPING)
        return MatrixProblem(weight, second=second, gamma=gamma, name=f"layer {self.name!r}")

    def second(self, weight: Array) -> Array:
        """Return the mean of ``x x^T``, shrunk as far as the second half of the data allows.

        See :func:`slim_lowrank.trust.trusted_shrinkage`; ``weight`` has the shape (out, in).
        """
        second, share = self.gram / self.rows, SHRINKAGE
        if self._half is not None and self._half[1] < self.rows:
            first, count = self._half
            share = trusted_shrinkage(weight, second, first / count, count / self.rows)
        return shrink(second, share)


def next_token_loss(logits: Any, batch: Any) -> Any:
    """Return the mean cross-entropy of the next token, for language models.

    ``batch`` is a dict with ``input_ids`` or a list whose first element they are, int32 of shape
    (batch, length); ``logits`` has the shape (batch, length, vocabulary).
    """
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch[0]
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return ops.cross_entropy(rows, ops.cast(ids[:, 1:].reshape(-1), ms.int32))


def collect_moments(
    network: Any,
    cells: Mapping[str, Any],
    datasets: Iterable[Any],
    max_iter: int = -1,
    loss: Loss | None = None,
) -> dict[str, LayerMoments]:
    """Run a network over data in PyNative mode; convolutions are seen pixel by pixel.

    Parameters
    ----------
    network : Cell
    cells : mapping of str to Cell
        Those to watch.
    datasets : iterable
        Batches, each a dict of keyword arguments or a list or tuple of positional ones.
    max_iter : int
        How many to use; 0 and -1 mean all.
    loss : callable, optional
        Asks for gradients; they need memory for those of all parameters.

    Raises
    ------
    CalibrationError
        There are no batches, or they do not reach a cell.
    InvalidTypeError
        A batch is none of the above.
    InvalidValueError
        The loss is no scalar.
    """
    found = {name: LayerMoments(name) for name in cells}
    batches = list(itertools.islice(datasets, max_iter if max_iter > 0 else None))
    for index, batch in enumerate(batches):
        if not isinstance(batch, (Mapping, list, tuple)):
            kind = type(batch).__name__
            raise InvalidTypeError(f"datasets[{index}] must be dict or list, not {kind}")
    with pynative(), _evaluating(network), contextlib.ExitStack() as hooks:
        for name, cell in cells.items():
            hooks.callback(watch(cell, found[name].update).remove)
            if loss is not None:
                hooks.callback(_watch_gradients(cell, found[name]).remove)
        for index, batch in enumerate(batches):
            if index == len(batches) // 2:
                for moments in found.values():
                    moments.halve()
            _run(network, batch, loss)
    silent = [name for name, moments in found.items() if not moments.rows]
    if not batches or silent:
        where = f"never reached {', '.join(silent[:5])}" if batches else "hold no batch"
        raise CalibrationError(f"the datasets {where}")
    return found


def _run(network: Any, batch: Any, loss: Loss | None) -> None:
    def forward() -> Any:
        return network(**batch) if isinstance(batch, Mapping) else network(*batch)

    if loss is None:
        forward()
        return

    def value() -> Any:
        found = loss(forward(), batch)
        if not isinstance(found, Tensor) or found.size != 1:
            raise InvalidValueError("loss must return a scalar Tensor")
        return found

    parameters = [p for p in network.get_parameters() if p.dtype in FLOATS]
    wanted = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad = True
    try:
        ms.value_and_grad(value, None, parameters)()
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad = flag


def _watch_gradients(cell: Any, moments: LayerMoments) -> Any:
    def look(_: Any, inputs: Any, outputs: Any) -> None:
        gradient = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
        g = ops.cast(gradient, ms.float32).asnumpy()
        moments.update_gradients(g.reshape(-1, g.shape[-1]))

    return cell.register_backward_hook(look)


@contextlib.contextmanager
def _evaluating(network: Any) -> Iterator[None]:
    flags = [(cell, cell.training) for _, cell in network.cells_and_names()]
    network.set_train(False)
    try:
        yield
    finally:
        for cell, flag in flags:  # parents come first: setting one sets those below it
            cell.set_train(flag)

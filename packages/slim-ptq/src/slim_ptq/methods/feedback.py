"""The factorization behind GPTQ: how the error of one column is made up for by the next ones.

With ``H + damp = U D Uᵀ``, ``U`` unit upper triangular, the output error of ``E = W - W_q`` is::

    tr(E H Eᵀ) = sum_j D_j ||e_j + sum_{k<j} e_k U_kj||²

so columns are quantized one after the other, each with the errors before it added.  This is the
recursion of GPTQ (arXiv:2210.17323) in the form of LDLQ (arXiv:2307.13304), which are the same;
no inverse of ``H`` is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slim_core.errors import NumericalError
from slim_core.logging import get_logger
from slim_core.numerics import check_finite

_log = get_logger("ptq")

_RAISE = 10.0  # factor from one damping to the next
_MOST = 1.0  # times the mean of the diagonal: a Hessian that is not definite then is no Hessian


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """Factorized Hessians of one size.

    Parameters
    ----------
    hessian : torch.Tensor
        float32, shape (batch, in, in), damped, in the order of ``order``.
    upper : torch.Tensor
        float32, shape (batch, in, in): ``U``, unit upper triangular.
    diagonal : torch.Tensor
        float32, shape (batch, in): ``D``.
    order : torch.Tensor
        int64, shape (batch, in): the input channels in the order in which they are quantized.
    notes : tuple of tuple of str
        Of each Hessian.
    """

    hessian: torch.Tensor
    upper: torch.Tensor
    diagonal: torch.Tensor
    order: torch.Tensor
    notes: tuple[tuple[str, ...], ...]


def factorize(
    names: Sequence[str],
    hessians: Sequence[torch.Tensor],
    damp: float,
    orders: Sequence[torch.Tensor | None],
) -> Feedback:
    """Damp and factorize Hessians of one size.

    ``damp`` times the mean of the diagonal is added to the diagonal.  Where the factorization
    fails, it is repeated in float64, then with tenfold damping up to the mean itself; what was
    done is logged and noted.  Channels without any input get the mean of the diagonal, so that
    their weights are rounded to nearest.

    Parameters
    ----------
    names : sequence of str
        Of the layers, for messages.
    hessians : sequence of torch.Tensor
        Each float32, shape (in, in): the mean of ``x xᵀ``.
    orders : sequence of torch.Tensor or None
        Each int64, shape (in,): in which channels are quantized; None for the natural order.

    Raises
    ------
    NumericalError
        A Hessian is not finite, or not positive definite with any damping.
    """
    first = hessians[0]
    shape = (len(hessians), *first.shape)
    work = torch.empty(shape, device=first.device)
    for name, hessian, order, own in zip(names, hessians, orders, work, strict=True):
        check_finite(name, "mean of x xᵀ", hessian)
        if order is None:
            own.copy_(hessian)
        else:
            torch.index_select(hessian.float()[order], 1, order, out=own)
    diagonal = work.diagonal(dim1=1, dim2=2)  # a view
    means = diagonal.mean(dim=1, keepdim=True)
    silent = diagonal <= 0
    diagonal.copy_(torch.where(silent, torch.where(means > 0, means, 1.0), diagonal))
    diagonal += damp * means
    upper = torch.empty(shape, device=first.device).mT  # as the factors come
    pivots = torch.empty_like(diagonal)
    # One at a time: temporaries of all are slower, and a device is not waited for in between.
    failed = torch.stack([_factor(*one) for one in zip(work, upper, pivots, strict=True)]).tolist()
    notes = []
    for index, (name, count) in enumerate(zip(names, silent.sum(dim=1).tolist(), strict=True)):
        said: tuple[str, ...] = ()
        if count:
            said = (f"{count} input channels saw no signal: their weights are rounded to nearest",)
        if failed[index]:
            own = work[index], upper[index], pivots[index]
            said += _noted(name, damp, _insist(name, *own, damp, float(means[index])))
        notes.append(said)
    natural = torch.arange(len(first), device=first.device)
    order = torch.stack([natural if order is None else order for order in orders])
    return Feedback(work, upper, pivots, order, tuple(notes))


def _factor(damped: torch.Tensor, upper: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """Write ``U`` and ``D`` of a matrix; returns whether there are none."""
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    roots = lower.diagonal().flip(0)
    upper.copy_(lower.flip(0, 1).div_(roots))
    pivots.copy_(roots.square())
    failed: torch.Tensor = (info != 0) | ~torch.isfinite(roots).all()
    return failed


def _insist(
    name: str,
    hessian: torch.Tensor,
    upper: torch.Tensor,
    pivots: torch.Tensor,
    damp: float,
    mean: float,
) -> float:
    """Factorize a damped Hessian in float64, damped more if need be; returns the damping."""
    raised = damp
    while _factor(hessian.double(), upper, pivots):
        if raised >= _MOST:
            raise NumericalError(
                f"the mean of x xᵀ of {name} is not positive definite",
                hint="the calibration data may be degenerate; try other texts",
            )
        before, raised = raised, min(max(raised, 1e-4) * _RAISE, _MOST)
        hessian.diagonal().add_((raised - before) * mean)
    return raised


def _noted(name: str, damp: float, raised: float) -> tuple[str, ...]:
    if raised != damp:
        note = f"damping raised from {damp:g} to {raised:g}: the Hessian was not positive definite"
    else:
        note = "the Hessian was factorized in float64, since float32 did not suffice"
    _log.warning("%s: %s", name, note)
    return (note,)

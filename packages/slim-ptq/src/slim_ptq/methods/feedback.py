"""The factorization behind GPTQ: how the error of one column is made up for by the next ones.

With ``H + damp = U D Uᵀ``, ``U`` unit upper triangular, the output error of ``E = W - W_q`` is::

    tr(E H Eᵀ) = sum_j D_j ||e_j + sum_{k<j} e_k U_kj||²

so columns are quantized one after the other, each with the errors before it added.  This is the
recursion of GPTQ (arXiv:2210.17323) in the form of LDLQ (arXiv:2307.13304), which are the same;
no inverse of ``H`` is formed.
"""

from __future__ import annotations

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
    """A factorized Hessian.

    Parameters
    ----------
    hessian : torch.Tensor
        float32, shape (in, in), damped, in the order of ``order``.
    upper : torch.Tensor
        float32, shape (in, in): ``U``, unit upper triangular.
    diagonal : torch.Tensor
        float32, shape (in,): ``D``.
    order : torch.Tensor
        int64, shape (in,): the input channels in the order in which they are quantized.
    notes : tuple of str
    """

    hessian: torch.Tensor
    upper: torch.Tensor
    diagonal: torch.Tensor
    order: torch.Tensor
    notes: tuple[str, ...] = ()


def factorize(
    name: str, hessian: torch.Tensor, damp: float, order: torch.Tensor | None = None
) -> Feedback:
    """Damp and factorize a Hessian.

    ``damp`` times the mean of the diagonal is added to the diagonal.  Where the factorization
    fails, it is repeated in float64, then with tenfold damping up to the mean itself; what was
    done is logged and noted.  Channels without any input get the mean of the diagonal, so that
    their weights are rounded to nearest.

    Parameters
    ----------
    name : str
        Of the layer, for messages.
    hessian : torch.Tensor
        float32, shape (in, in): the mean of ``x xᵀ``.
    order : torch.Tensor, optional
        In which channels are quantized, the natural one if not given.

    Raises
    ------
    NumericalError
        The Hessian is not finite, or not positive definite with any damping.
    """
    check_finite(name, "mean of x xᵀ", hessian)
    if order is None:
        order = torch.arange(hessian.shape[0], device=hessian.device)
        work = hessian.float().clone()
    else:
        work = hessian.float()[order][:, order]
    diagonal = work.diagonal()
    mean = float(diagonal.mean())
    silent = diagonal <= 0
    notes: tuple[str, ...] = ()
    count = int(silent.sum())
    if count:
        notes = (f"{count} input channels saw no signal: their weights are rounded to nearest",)
        diagonal[silent] = mean or 1.0  # a view: writes into the matrix
    raised = damp
    while True:
        damped = work.clone()
        damped.diagonal().add_(raised * mean)
        for dtype in (torch.float32, torch.float64):
            lower, info = torch.linalg.cholesky_ex(damped.to(dtype).flip(0, 1))
            if not int(info) and bool(torch.isfinite(lower.sum())):
                notes += _noted(name, damp, raised, dtype)
                upper = lower.flip(0, 1)
                pivots = upper.diagonal().clone()
                upper = upper.div_(pivots).float()
                return Feedback(damped, upper, pivots.square().float(), order, notes)
        if raised >= _MOST:
            raise NumericalError(
                f"the mean of x xᵀ of {name} is not positive definite",
                hint="the calibration data may be degenerate; try other texts",
            )
        raised = min(max(raised, 1e-4) * _RAISE, _MOST)


def _noted(name: str, damp: float, raised: float, dtype: torch.dtype) -> tuple[str, ...]:
    if raised != damp:
        note = f"damping raised from {damp:g} to {raised:g}: the Hessian was not positive definite"
    elif dtype is torch.float64:
        note = "the Hessian was factorized in float64, since float32 did not suffice"
    else:
        return ()
    _log.warning("%s: %s", name, note)
    return (note,)

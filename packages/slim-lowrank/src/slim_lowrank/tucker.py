"""Tucker-2 decomposition of convolution kernels over their two channel modes.

De Lathauwer, De Moor, Vandewalle: "On the best rank-1 and rank-(R1, ..., RN) approximation of
higher-order tensors" (2000); its use on kernels: Kim et al., ICLR 2016.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from slim_core.errors import InvalidValueError
from slim_core.validate import check_int
from slim_lowrank.factorize import Array, check_matrix, top_eigh


class Tucker2(NamedTuple):
    """``weight ~ core x_0 u_out x_1 u_in``.

    ``core (r_out, r_in, *kernel)``, ``u_out (out, r_out)``, ``u_in (in, r_in)`` with orthonormal
    columns, float64; ``error`` is the Frobenius error over the norm of the weight.
    """

    core: Array
    u_out: Array
    u_in: Array
    error: float
    sweeps: int


def unfold(tensor: Array, mode: int) -> Array:
    """Lay a tensor out as a matrix whose rows run over ``mode``."""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def tucker2(
    weight: Any,
    rank_out: int,
    rank_in: int,
    *,
    max_sweeps: int = 100,
    tolerance: float = 1e-4,
    name: str = "weight",
) -> Tucker2:
    """Decompose a kernel by HOSVD and alternating sweeps (HOOI).

    Parameters
    ----------
    weight : array_like, shape (out, in, *kernel)
        Any real dtype; computed in float64.
    rank_out, rank_in : int
        In ``[1, out]`` and ``[1, in]``.
    max_sweeps : int
        Upper bound of the sweeps; 0 gives the plain HOSVD.
    tolerance : float
        Sweeps stop, from the third on, when the relative error changes by less.
    name : str
        What errors call the weight.

    Raises
    ------
    InvalidValueError
        The weight has fewer than two modes or a rank is out of range.
    NumericalError
        The weight holds NaN or infinity.
    """
    array = np.asarray(weight)
    if array.ndim < 2:
        raise InvalidValueError(f"{name} must have at least two modes, not {array.ndim}")
    tensor: Array = check_matrix(name, array.reshape(array.shape[0], -1)).reshape(array.shape)
    check_int(f"rank_out of {name}", rank_out, low=1, high=tensor.shape[0])
    check_int(f"rank_in of {name}", rank_in, low=1, high=tensor.shape[1])
    u_out, u_in = _leading(tensor, 0, rank_out), _leading(tensor, 1, rank_in)
    error, sweeps = relative_error(tensor, u_out, u_in), 0
    for sweeps in range(1, max_sweeps + 1):
        u_out = _leading(_project(tensor, u_in, 1), 0, rank_out)
        u_in = _leading(_project(tensor, u_out, 0), 1, rank_in)
        previous, error = error, relative_error(tensor, u_out, u_in)
        if sweeps >= 3 and abs(previous - error) < tolerance:
            break
    core = _project(_project(tensor, u_out, 0), u_in, 1)
    return Tucker2(core, u_out, u_in, error, sweeps)


def relative_error(tensor: Array, u_out: Array, u_in: Array) -> float:
    """Return the error of the projection onto both bases over the norm of the tensor."""
    total = float(np.sum(tensor**2))
    kept = float(np.sum(_project(_project(tensor, u_out, 0), u_in, 1) ** 2))
    return math.sqrt(abs(total - kept) / total) if total else 0.0


def _project(tensor: Array, basis: Array, mode: int) -> Array:
    return np.moveaxis(np.tensordot(basis.T, tensor, axes=(1, mode)), 0, mode)


def _leading(tensor: Array, mode: int, rank: int) -> Array:
    """Return the leading left singular vectors of an unfolding, largest entries positive."""
    matrix = unfold(tensor, mode)
    _, vectors = top_eigh(matrix @ matrix.T, rank)
    largest = np.argmax(np.abs(vectors), axis=0)
    signs = np.sign(vectors[largest, np.arange(rank)])
    return vectors * np.where(signs == 0, 1.0, signs)

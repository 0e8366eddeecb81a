"""Four ways to write a convolution as a chain of smaller ones.

========  ==========================================================  =======================
form      chain                                                       weights at rank r
========  ==========================================================  =======================
out       kernel to r channels, then 1x1                              r (in taps + out)
in        1x1 to r channels, then kernel                              r (in + taps out)
spatial   (height, 1) to r channels, then (1, width)                  r (in height + out width)
tucker2   1x1 to r_in, kernel to r_out, 1x1                           as the quadratic in ranks
========  ==========================================================  =======================

No form wins always, so callers compare the predicted errors.  All are solved by one idea: the
first map fixes what is seen of a patch, and the rest is the reduced-rank regression of the outputs
on it, in the metric of the patches (``second``) and of the loss (``gamma``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from slim_lowrank.factorize import Array, balance
from slim_lowrank.tucker import tucker2
from slim_lowrank.whitening import MatrixProblem, symmetric_power


def fit(
    form: str,
    weight: Array,
    ranks: tuple[int, ...],
    *,
    second: Array | None = None,
    gamma: Array | None = None,
    name: str = "weight",
) -> tuple[Array, ...]:
    """Return the kernels of a chain, each ``(out, in, *kernel)``, in the order of application.

    Parameters
    ----------
    form : str
        ``out``, ``in``, ``spatial`` or ``tucker2``.
    weight : array, shape (out, in, *kernel)
        The kernel, float64.
    ranks : tuple of int
        ``(r,)``, or ``(r_out, r_in)`` for ``tucker2``.
    second : array, shape (f, f), optional
        ``E[p p^T]`` of the patches ``p`` of ``f = in * prod(kernel)`` values, positive definite;
        without it the error of the weight itself is minimised.
    gamma : array, shape (out, out), optional
        Second moment of the gradients of the outputs, positive definite.
    name : str
        What errors call the layer.
    """
    out, inp, *kernel = weight.shape
    ones, flat = [1] * len(kernel), weight.reshape(out, -1)
    if form == "out":
        problem = MatrixProblem(flat, second=second, gamma=gamma, name=name)
        first, last = problem.factors(ranks[0])
        return first.reshape(-1, inp, *kernel), last.reshape(out, -1, *ones)
    if form == "in":
        seen = _channel_map(weight, ranks[0], second, gamma, name)
        core = regress(flat, _over_taps(seen, math.prod(kernel)), second)
        return seen.reshape(-1, inp, *ones), core.reshape(out, -1, *kernel)
    if form == "spatial":
        return _fit_spatial(weight, ranks[0], second, gamma, name)
    if second is None and gamma is None:
        core, u_out, u_in = tucker2(weight, *ranks, name=name)[:3]
        return u_in.T.reshape(-1, inp, *ones), core, u_out.reshape(out, -1, *ones)
    return _fit_tucker2(weight, ranks, second, gamma, name)


def compose(form: str, kernels: Sequence[Array]) -> Array:
    """Return the dense kernel that a chain stands for."""
    if form == "spatial":
        return np.asarray(np.einsum("rih,orw->oihw", kernels[0][..., 0], kernels[1][:, :, 0]))
    dense = kernels[0]
    for kernel in kernels[1:]:
        left, right = kernel.shape[2:], dense.shape[2:]
        product = np.tensordot(kernel, dense, axes=(1, 0))
        product = np.moveaxis(product, 1 + len(left), 1)
        taps = left if math.prod(left) > 1 else right
        dense = product.reshape(kernel.shape[0], dense.shape[1], *taps)
    return dense


def regress(flat: Array, phi: Array, second: Array | None) -> Array:
    """Return the ``C`` with the least ``E |(W - C phi) p|^2``, shape ``(out, features)``."""
    moved = phi.T if second is None else second @ phi.T
    gram, target = phi @ moved, flat @ moved
    try:
        solved = scipy.linalg.solve(gram, target.T, assume_a="pos", check_finite=False)
    except scipy.linalg.LinAlgError:
        solved = scipy.linalg.lstsq(gram, target.T, check_finite=False)[0]
    return np.asarray(solved.T)


def _channel_second(second: Array, inp: int, taps: int) -> Array:
    """Mean second moment of the input channels over the taps of the patch, ``(in, in)``."""
    blocks = second.reshape(inp, taps, inp, taps)
    return np.asarray(np.einsum("itjt->ij", blocks) / taps)


def _weigh_outputs(weight: Array, gamma: Array | None) -> Array:
    if gamma is None:
        return weight
    return np.asarray(np.tensordot(symmetric_power(gamma, 0.5), weight, axes=(1, 0)))


def _channel_map(
    weight: Array, rank: int, second: Array | None, gamma: Array | None, name: str
) -> Array:
    """Return the ``(r, in)`` map of the input channels that loses least."""
    out, inp, *kernel = weight.shape
    taps = math.prod(kernel)
    rows = _weigh_outputs(weight, gamma).reshape(out, inp, taps)
    channels = None if second is None else _channel_second(second, inp, taps)
    unfolded = np.moveaxis(rows, 1, 2).reshape(out * taps, inp)
    return MatrixProblem(unfolded, second=channels, name=name).factors(rank)[0]


def _over_taps(seen: Array, taps: int) -> Array:
    """Apply a channel map at every tap: ``(r taps, in taps)``, taps fastest."""
    return np.kron(seen, np.eye(taps))


def _fit_tucker2(
    weight: Array, ranks: tuple[int, ...], second: Array | None, gamma: Array | None, name: str
) -> tuple[Array, ...]:
    out, inp, *kernel = weight.shape
    taps, ones = math.prod(kernel), [1] * len(kernel)
    tensor = _weigh_outputs(weight, gamma)
    inverse = np.eye(inp)
    if second is not None:
        channels = _channel_second(second, inp, taps)
        inverse = symmetric_power(channels, -0.5)
        tensor = np.moveaxis(np.tensordot(tensor, symmetric_power(channels, 0.5), (1, 0)), -1, 1)
    seen = tucker2(tensor, *ranks, name=name).u_in.T @ inverse
    phi = _over_taps(seen, taps)
    full = regress(weight.reshape(out, -1), phi, second)
    moment = phi @ phi.T if second is None else phi @ second @ phi.T
    core, last = MatrixProblem(full, second=moment, gamma=gamma, name=name).factors(ranks[0])
    return (
        seen.reshape(-1, inp, *ones),
        core.reshape(-1, ranks[1], *kernel),
        last.reshape(out, -1, *ones),
    )


def _fit_spatial(
    weight: Array, rank: int, second: Array | None, gamma: Array | None, name: str
) -> tuple[Array, ...]:
    out, inp, height, width = weight.shape
    tall = np.transpose(_weigh_outputs(weight, gamma), (0, 3, 1, 2)).reshape(out * width, -1)
    columns = None
    if second is not None:
        blocks = second.reshape(inp * height, width, inp * height, width)
        columns = np.einsum("awbw->ab", blocks) / width
    seen, last = MatrixProblem(tall, second=columns, name=name).factors(rank)
    if second is None and gamma is None:
        wide = last.reshape(out, width, rank)
        return seen.reshape(rank, inp, height, 1), np.moveaxis(wide, 1, 2)[:, :, None, :]
    phi = np.kron(seen, np.eye(width))
    wide = regress(weight.reshape(out, -1), phi, second)
    down, up = balance(seen, wide.reshape(out, rank, width).transpose(0, 2, 1).reshape(-1, rank))
    return (
        down.reshape(rank, inp, height, 1),
        up.reshape(out, width, rank).transpose(0, 2, 1)[:, :, None, :],
    )

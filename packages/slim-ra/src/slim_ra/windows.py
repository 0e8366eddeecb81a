"""Windows of ALiBi heads from weights alone: the deployed formula, and a rigorous bound.

An ALiBi head with slope ``l`` lowers a logit by ``l`` for every token of distance, so far tokens
get next to no attention whatever they hold, and a head needs its latest ``L`` tokens only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slim_core.errors import InvalidValueError, StructureError
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_core.validate import check_choice
from slim_ra.alibi import standard_slopes
from slim_ra.config import RACompressConfig, check_positive
from slim_ra.geometry import head_geometry, position_encoding
from slim_ra.profile import AlibiWindows
from slim_ra.weights import HeadWeights, alibi_weights, decoder_blocks, query_key_linears

BOUNDS = ("tight", "simple", "paper")
_ROWS = 1024  # rows of a query-key product held at once
_log = get_logger("ra")


@torch.inference_mode()
def legacy_windows(
    model: nn.Module, config: RACompressConfig | None = None, *, clamp: bool = False
) -> AlibiWindows:
    """Windows by the formula of the deployed tables, ``win.pt`` compatible.

    ``int((alpha + ln(theta) + sqrt(max(0, m))) / slope)`` with ``m`` the largest entry of any
    ``Wq_h Wk_h^T`` over layers, where, as in the deployed tool, head ``h`` is a slice of *input
    columns* of the weights and the slopes are the standard ones.

    Parameters
    ----------
    model : nn.Module
    config : RACompressConfig, optional
    clamp : bool
        Raise windows below 1 to 1, which a cache can hold.

    Returns
    -------
    AlibiWindows
        ``[heads]``; negative where ``alpha + ln(theta) < 0``, as in the deployed tool, unless
        clamped.

    Raises
    ------
    StructureError
        No blocks or projections were found, or the model has neither ALiBi nor rotary positions.
    """
    config = config or RACompressConfig()
    _check_encoding(model)
    base = config.alpha + math.log(config.theta)
    if base < 0:
        _log.warning("alpha + ln(theta) is %.4f: windows of heads may be negative", base)
    heads = head_geometry(getattr(model, "config", None)).heads
    largest = torch.zeros(heads, dtype=torch.float64)
    for block in track(decoder_blocks(model), "windows"):
        query, key = _legacy_split(query_key_linears(block))
        for head in range(heads):
            top = _largest_product(_columns(query, head, heads), _columns(key, head, heads))
            largest[head] = max(float(largest[head]), top)
    windows = [
        int((base + math.sqrt(top)) / slope)
        for top, slope in zip(largest.tolist(), standard_slopes(heads).tolist(), strict=True)
    ]
    if clamp:
        windows = [max(1, window) for window in windows]
    settings = {"mode": "legacy", "theta": config.theta, "alpha": config.alpha}
    return AlibiWindows(torch.tensor(windows), settings)


@torch.inference_mode()
def bound_windows(
    model: nn.Module, epsilon: float = 1e-4, *, mass: bool = False, bound: str = "tight"
) -> AlibiWindows:
    """Windows outside of which no attention weight can exceed ``epsilon``, for any input.

    Parameters
    ----------
    model : nn.Module
        An ALiBi model; see :func:`slim_ra.weights.alibi_weights` for the layouts.
    epsilon : float
        In ``(0, 1)``.
    mass : bool
        Bound the *sum* of all weights outside instead, so that the output of the head moves by at
        most ``2 * epsilon * max |v|``.
    bound : {"tight", "simple", "paper"}
        How content logits are bounded.  ``paper`` is the published factor, which holds only when
        the normalised inputs stay within 1 in every coordinate.

    Returns
    -------
    AlibiWindows
        ``[layers, heads]``.

    Notes
    -----
    Exact arithmetic is assumed: models that round their ALiBi bias to 16 bits can exceed it.
    """
    _check_epsilon(epsilon)
    check_choice("bound", bound, BOUNDS)
    if position_encoding(model) != "alibi":
        raise StructureError(f"{type(model).__name__} has no ALiBi position encoding")
    rows = [
        windows_of_bound(content_bound(weights, bound), weights.slopes, epsilon, mass=mass)
        for weights in track(list(alibi_weights(model)), "bounds")
    ]
    settings = {"mode": "bound", "epsilon": epsilon, "mass": mass, "bound": bound}
    return AlibiWindows(torch.stack(rows), settings)


def windows_of_bound(content: Tensor, slopes: Tensor, epsilon: float, *, mass: bool) -> Tensor:
    """Turn bounds on ``|scaled q.k|`` into windows, int64 ``[H]``.

    The token at distance ``n`` has at most ``exp(2 B - l n)`` times the weight of the query's own
    token, whose bias is zero; ``mass`` adds those up from ``L`` on.
    """
    tail = -torch.expm1(-slopes) if mass else torch.ones_like(slopes)
    return ((2 * content - (epsilon * tail).log()) / slopes).ceil().clamp(min=1).long()


def content_bound(weights: HeadWeights, bound: str = "tight") -> Tensor:
    """Upper bound of ``|scaled q.k|`` of each head over all inputs, fp64 ``[H]``.

    A normalised vector has a length of at most ``sqrt(d)``; gain and shift of the norm, and the
    biases of the projections, are taken into account.
    """
    width = weights.gain.numel()
    query, key = weights.query * weights.gain, weights.key * weights.gain
    query_shift = weights.query @ weights.shift + weights.query_bias
    key_shift = weights.key @ weights.shift + weights.key_bias
    if bound == "paper":
        norm = _product_norm(weights.query, weights.key)
        limit = norm * (weights.gain.square().sum() + weights.shift.square().sum())
    elif bound == "simple":
        long = math.sqrt(width)
        q_norm = long * torch.linalg.matrix_norm(query, ord=2) + query_shift.norm(dim=-1)
        k_norm = long * torch.linalg.matrix_norm(key, ord=2) + key_shift.norm(dim=-1)
        limit = q_norm * k_norm
    else:
        cross = (query.mT @ key_shift[..., None]).norm(dim=(-2, -1))
        cross = cross + (key.mT @ query_shift[..., None]).norm(dim=(-2, -1))
        own = (query_shift * key_shift).sum(-1).abs()
        limit = width * _product_norm(query, key) + math.sqrt(width) * cross + own
    limit = limit * weights.scale
    if weights.clip is not None:
        limit = limit.clamp(max=weights.scale * weights.query.shape[1] * weights.clip**2)
    return limit


def _product_norm(query: Tensor, key: Tensor) -> Tensor:
    """Spectral norm of ``query^T key`` for ``[H, D, d]`` factors, without the ``d x d`` product."""
    r_query = torch.linalg.qr(query.mT, mode="r").R
    r_key = torch.linalg.qr(key.mT, mode="r").R
    norms: Tensor = torch.linalg.matrix_norm(r_query @ r_key.mT, ord=2)
    return norms


def _check_epsilon(epsilon: float) -> None:
    if check_positive("epsilon", epsilon) >= 1.0:
        raise InvalidValueError(f"epsilon must be below 1, not {epsilon}")


def _check_encoding(model: nn.Module) -> None:
    encoding = position_encoding(model)
    # A bare nn.Module may say nothing about its positions; a Hugging Face model always does.
    if encoding is None and hasattr(model, "base_model_prefix"):
        raise StructureError(
            f"{type(model).__name__} has neither ALiBi nor rotary position encoding",
            hint="windows mean nothing for it",
        )
    if encoding != "alibi":
        _log.warning(
            "%s does not declare ALiBi positions; windows are computed as if it had them",
            type(model).__name__,
        )


def _legacy_split(linears: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    weights = [linear.weight.detach() for linear in linears]
    if len(weights) == 1:
        rows = weights[0].shape[0]
        if rows % 3:
            raise StructureError(f"QKV fused weight first dimension must be divisible by 3: {rows}")
        query, key, _ = weights[0].chunk(3)
        return query, key
    if len(weights) == 2:
        rows = weights[1].shape[0]
        if rows % 2:
            raise StructureError(f"KV fused weight first dimension must be divisible by 2: {rows}")
        return weights[0], weights[1].chunk(2)[0]
    return weights[0], weights[1]


def _columns(weight: Tensor, head: int, heads: int) -> Tensor:
    width = weight.shape[1] // heads
    return weight[:, head * width : (head + 1) * width].float().cpu()


def _largest_product(query: Tensor, key: Tensor) -> float:
    return max(float((rows @ key.T).max()) for rows in torch.split(query, _ROWS))

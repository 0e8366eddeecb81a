"""Windows of ALiBi heads measured on text: the smallest that keep nearly all attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slim_core.errors import CalibrationError, InvalidValueError, NumericalError, StructureError
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_ra.config import check_positive
from slim_ra.geometry import position_encoding
from slim_ra.lse import TILE_BYTES, dots
from slim_ra.observe import Attention, observed
from slim_ra.profile import AlibiWindows

_SATURATED = 0.85  # of the text's length: a window this long was probably cut off by its end
_log = get_logger("ra")


@torch.inference_mode()
def calibrated_windows(
    model: Any, ids: Sequence[Tensor], epsilon: float = 1e-3, *, delta: float = 0.01
) -> AlibiWindows:
    """Find for each layer and head the smallest window that loses little on given text.

    A window ``W`` is enough for a query if the attention to tokens ``W`` or more back sums to at
    most ``epsilon``.  The result is enough for a share ``1 - delta`` of all queries.

    Parameters
    ----------
    model : PreTrainedModel
        Bloom, MPT, or Falcon with ALiBi.
    ids : sequence of Tensor
        int64 ``[B, T]`` token ids without padding.  Windows cannot come out longer than ``T``.
    epsilon : float
        Lost attention a query, in ``(0, 1)``.
    delta : float
        Share of queries that may lose more, in ``[0, 1)``.

    Returns
    -------
    AlibiWindows
        ``[layers, heads]``.

    Raises
    ------
    CalibrationError
        No text, or only single tokens.
    """
    if check_positive("epsilon", epsilon) >= 1:
        raise InvalidValueError(f"epsilon must be below 1, not {epsilon}")
    if not 0 <= delta < 1:
        raise InvalidValueError(f"delta must be in [0, 1), not {delta}")
    if position_encoding(model) != "alibi":
        raise StructureError(f"{type(model).__name__} has no ALiBi position encoding")
    if not ids or any(row.ndim != 2 or row.shape[1] < 2 for row in ids):
        raise CalibrationError("calibration needs token ids of shape [B, T] with T >= 2")
    needed: dict[int, list[Tensor]] = {}

    def observe(attention: Attention) -> None:
        rows = needed_windows(attention, epsilon).transpose(0, 1).flatten(1)
        needed.setdefault(attention.layer, []).append(rows.cpu())

    training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    try:
        with observed(model, observe):
            for batch in track(list(ids), "calibrating"):
                model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        model.train(training)
    windows = [_quantile(torch.cat(needed[layer], 1), 1 - delta) for layer in sorted(needed)]
    found = torch.stack(windows)
    longest = max(batch.shape[1] for batch in ids)
    cut_short = int((found > _SATURATED * longest).sum())
    if cut_short:
        _log.warning(
            "%d of %d windows nearly span the texts of %d tokens: calibrate on longer ones",
            cut_short,
            found.numel(),
            longest,
        )
    tokens = sum(batch.numel() for batch in ids)
    settings = {"mode": "calibrated", "epsilon": epsilon, "delta": delta, "tokens": tokens}
    return AlibiWindows(found, settings)


def needed_windows(attention: Attention, epsilon: float) -> Tensor:
    """Smallest window of each query with at most ``epsilon`` outside, int64 ``[B, H, T]``."""
    batch, heads, length, _ = attention.query.shape
    tile = max(1, TILE_BYTES // (4 * batch * heads * length))
    columns = torch.arange(length, device=attention.query.device)
    parts = []
    for start in range(0, length, tile):
        rows = columns[start : start + tile]
        keys = attention.key[:, :, : int(rows[-1]) + 1]
        logits = dots(attention.query[:, :, rows], keys, attention.scale, attention.softcap)
        if attention.bias is not None:
            logits = logits + attention.bias[:, :, None, : keys.shape[2]]
        logits = logits.masked_fill(columns[: keys.shape[2]] > rows[:, None], -torch.inf)
        weights = (logits - attention.lse[:, :, rows, None]).exp()
        # What may go is the longest prefix whose weights sum to epsilon at most.
        outside = (weights.cumsum(-1) <= epsilon).sum(-1)
        if not bool(weights.isfinite().all()):
            raise NumericalError(f"attention of layer {attention.layer} is not finite")
        parts.append((rows + 1 - outside).clamp(min=1))
    return torch.cat(parts, -1)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Smallest value that a ``share`` of each row does not exceed, int64 ``[rows]``."""
    ordered = values.sort(-1).values
    index = min(values.shape[1] - 1, max(0, -int(-(share * values.shape[1]) // 1) - 1))
    return ordered[:, index]

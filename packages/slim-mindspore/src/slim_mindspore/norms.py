"""Moving smoothing scales into the norms that linear cells read from.

A format without a place for scales that divide an input can hold a smoothed network in this way:
the norm is divided by them, so every cell that reads it has to share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slim_core.errors import StructureError
from slim_core.logging import get_logger
from slim_mindspore.algorithm_args import AwqArgs
from slim_mindspore.layer_policy import LayerPolicy
from slim_mindspore.linears import cell_at, set_weight, weight_of
from slim_mindspore.methods.awq import awq
from slim_mindspore.methods.smooth import smooth_scales
from slim_mindspore.quantization_config import QuantizationConfig
from slim_mindspore.quantize_layer import stored
from slim_mindspore.statistics import Forward, InputStatistics, call_with_ids, collect

logger = get_logger("mindspore")

READERS = {
    "attention_norm": ("attention.wq", "attention.wk", "attention.wv", "attention.w_qkv"),
    "ffn_norm": ("feed_forward.w1", "feed_forward.w3", "feed_forward.w_gate_hidden"),
}


def norm_readers(linears: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the linear cells that read each norm of a network with the names of MindFormers.

    Raises
    ------
    StructureError
        There are none.
    """
    readers: dict[str, list[str]] = {}
    for name in linears:
        for norm, cells in READERS.items():
            for cell in cells:
                if name.endswith(f".{cell}"):
                    readers.setdefault(f"{name.removesuffix(cell)}{norm}", []).append(name)
    if not readers:
        raise StructureError(
            "no linear cell is known to read a norm, so smoothing cannot go into norms",
            hint="set smooth_into to input",
        )
    return readers


def smooth_into_norms(
    network: Any,
    linears: Mapping[str, Any],
    config: QuantizationConfig,
    batches: Sequence[np.ndarray],
    storage: Any,
    forward: Forward = call_with_ids,
) -> frozenset[str]:
    """Divide norms by smoothing scales and multiply the cells that read them, in place.

    Parameters
    ----------
    network : Cell
    linears : mapping of str to Cell
        All its linear cells; those that are not to be smoothed have no say in the scales.
    config : QuantizationConfig
    batches : sequence of numpy.ndarray
        Token ids.
    storage : numpy dtype
        In which norms will be stored.  The cells are multiplied by what the rounded norm makes of
        the scales, so that only their own rounding remains.
    forward : callable
        ``forward(network, ids)`` runs a batch.

    Returns
    -------
    frozenset of str
        Names of the parameters that changed.
    """
    readers = norm_readers(linears)
    smoothed = {
        norm: [name for name in names if config.policy_of(name).outliers_suppression]
        for norm, names in readers.items()
    }
    watched = {norm: linears[names[0]] for norm, names in smoothed.items() if names}
    rows = any(policy.awq_args() for policy in config.policies)
    statistics = collect(network, watched, batches, forward=forward, rows=rows)
    changed: set[str] = set()
    for norm, seen in statistics.items():
        weights = np.concatenate([weight_of(linears[name]) for name in smoothed[norm]])
        policy = config.policy_of(smoothed[norm][0])
        scales = _scales(norm, seen, weights, policy, config.weight_range)
        effective = _divide(cell_at(network, norm), scales, storage)
        for name in readers[norm]:
            set_weight(linears[name], weight_of(linears[name]) * effective)
        changed.update(f"{name}.weight" for name in (norm, *readers[norm]))
        logger.debug("%s: divided by scales in [%.3g, %.3g]", norm, scales.min(), scales.max())
    return frozenset(changed)


def _scales(
    norm: str,
    seen: InputStatistics,
    weights: np.ndarray,
    policy: LayerPolicy,
    weight_range: str,
) -> np.ndarray:
    """Return the scales of the stacked weights of all cells that read a norm."""
    options, scheme = policy.awq_args(), policy.scheme().weight
    if options is None or scheme is None:
        smooth = policy.smooth_args()
        return smooth_scales(seen.peak, weights, 0.5 if smooth is None else smooth.alpha)
    unclipped = AwqArgs.model_validate(options.model_dump() | {"weight_clip_ratio": 1.0})
    return awq(norm, weights, seen.rows, seen.mean, scheme, unclipped, weight_range).smooth


def _divide(norm: Any, scales: np.ndarray, storage: Any) -> np.ndarray:
    """Divide the weight of a norm; return the scales that its rounded weight stands for."""
    before = weight_of(norm)
    after = stored(np.abs(before) / scales, storage) * np.sign(before)
    set_weight(norm, after)
    ratio = np.divide(before, after, out=np.ones_like(before), where=after != 0)
    return np.asarray(ratio.astype(np.float32))

"""Quantizing a network as a ``quantization_config`` says."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slim_core.errors import CalibrationError, PlanError, StructureError
from slim_core.logging import get_logger
from slim_core.numerics import EPS
from slim_core.progress import track
from slim_core.report import LayerReport
from slim_core.scheme import QuantScheme
from slim_mindspore.cells import activation_of, quant_cell
from slim_mindspore.kv_cache import ChannelKV, TokenKV
from slim_mindspore.linears import find_linears, replace_cell
from slim_mindspore.norms import smooth_into_norms
from slim_mindspore.quantization_config import QuantizationConfig
from slim_mindspore.quantize_layer import quantize_linear, relative_errors
from slim_mindspore.quantized_layer import CacheScales, SmoothedLinear, type_name
from slim_mindspore.statistics import Forward, InputStatistics, call_with_ids, collect

logger = get_logger("mindspore")

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(eq=False)
class QuantizedNetwork:
    """What :func:`quantize_network` made.

    Parameters
    ----------
    network : Cell
        The network, its cells replaced.
    config : QuantizationConfig
    layers : dict of str to SmoothedLinear
        By the names of the cells.
    caches : dict of str to CacheScales
        By the names of the attention cells; empty unless the cache has fixed scales.
    reports : list of LayerReport
        One for each linear cell, also for those left in floating point.
    inputs : dict of str to InputStatistics
        What calibration saw of the inputs of cells, without products and tokens.
    changed : frozenset of str
        Names of float parameters that are no longer those of the float network.
    """

    network: Any
    config: QuantizationConfig
    layers: dict[str, SmoothedLinear] = field(default_factory=dict)
    caches: dict[str, CacheScales] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()


def quantize_network(
    network: Any,
    config: QuantizationConfig,
    batches: Sequence[np.ndarray] = (),
    *,
    storage: Any = np.float32,
    layout: str = "gs-ptq",
    forward: Forward | None = None,
) -> QuantizedNetwork:
    """Replace the linear cells of a network by quantized ones, in place.

    Parameters
    ----------
    network : Cell
        Maps int32 ids (batch, length) to logits.
    config : QuantizationConfig
    batches : sequence of numpy.ndarray
        Token ids, shape (batch, length) each; not needed for ``rtn`` without an int8 cache.
    storage : numpy dtype
        In which the scales of static inputs, and norms that take up smoothing scales, will be
        stored: they are rounded to it before anything is derived from them, so that the file
        computes what the network does.
    layout : str
        Whose names the parameters of the new cells have.
    forward : callable, optional
        ``forward(network, ids)`` runs a batch; ``network(Tensor(ids))`` if None.

    Raises
    ------
    PlanError
        Layers that cannot be quantized as asked; lists all of them, before any work.
    CalibrationError
        Data is needed and missing, or does not reach a cell.
    StructureError
        The cache is to be quantized and the network has no attention cell of the known form.
    NumericalError
        NaN or infinity in weights or inputs; names the layer.
    """
    linears = find_linears(network)
    schemes = plan(config, linears)
    attentions = _find_attentions(network) if config.kvcache_dtype else {}
    static_cache = bool(attentions) and config.kvcache_quant_granularity == "per_channel"
    needy = {name for name in linears if config.policy_of(name).needs_data()}
    if (needy or static_cache) and not len(batches):
        raise CalibrationError(
            f"{config.quant_method} with these options needs calibration data",
            hint="pass batches of token ids (on the command line: -s FILE -t TYPE)",
        )
    done = QuantizedNetwork(network, config)
    run = forward or call_with_ids
    if config.smooth_into == "norm":
        done.changed = smooth_into_norms(network, linears, config, batches, storage, run)
    if static_cache:
        done.caches = _cache_scales(network, attentions, batches, run)
    for names in _stages(config, list(schemes)):
        watched = {name: linears[name] for name in names if name in needy}
        statistics = (
            collect(
                network,
                watched,
                batches,
                forward=run,
                rows=any(policy.awq_args() for policy in config.policies),
                hessian=any(policy.gptq_args() for policy in config.policies),
            )
            if watched
            else {}
        )
        for name in track(names, "Quantizing"):
            _quantize_cell(
                done, name, linears[name], schemes[name], statistics.get(name), storage, layout
            )
    for name, attention in attentions.items():
        _quantize_cache(name, attention, done.caches.get(name))
    network.update_parameters_name()
    return done


def plan(config: QuantizationConfig, linears: dict[str, Any]) -> dict[str, QuantScheme]:
    """Return the scheme of every linear cell, checked against its shape.

    Raises
    ------
    PlanError
        A group size does not divide the inputs of a layer, names that match nothing, or weights
        are to be quantized and none is left; lists everything.
    """
    schemes = {name: config.scheme_of(name) for name in linears}
    problems = [
        f"modules_to_not_convert: {part!r} is in the name of no linear cell"
        for part in config.modules_to_not_convert
        if not any(part in name for name in linears)
    ]
    problems += [
        f"layer_policies: {pattern!r} is found in the name of no linear cell"
        for pattern in config.layer_policies
        if not any(re.search(pattern, name) for name in linears)
    ]
    for name, scheme in schemes.items():
        inputs = linears[name].weight.shape[1 if getattr(linears[name], "transpose_b", True) else 0]
        if scheme.group_size and inputs % scheme.group_size:
            problems.append(f"{name}: group_size {scheme.group_size} does not divide {inputs}")
        elif scheme.group_size == inputs:
            problems.append(f"{name}: group_size {inputs} is all of its inputs; use per_channel")
    if config.weight_dtype and all(scheme.is_float for scheme in schemes.values()):
        problems.append("modules_to_not_convert leaves no linear cell to quantize")
    if problems:
        hint = "leave such layers out by modules_to_not_convert or layer_policies"
        raise PlanError(problems, hint=hint)
    return schemes


def _stages(config: QuantizationConfig, names: list[str]) -> list[list[str]]:
    """Return the layers in the groups whose inputs are watched together.

    GPTQ goes block by block: Hessians of one block are in memory at a time, and later blocks see
    the outputs of the quantized ones.
    """
    if not any(policy.gptq_args() for policy in config.policies):
        return [names]
    stages: dict[str, list[str]] = {}
    for name in names:
        match = _BLOCK.match(name)
        stages.setdefault(match.group(1) if match else name, []).append(name)
    return list(stages.values())


def _quantize_cell(
    done: QuantizedNetwork,
    name: str,
    cell: Any,
    scheme: QuantScheme,
    statistics: InputStatistics | None,
    storage: Any,
    layout: str,
) -> None:
    size = int(np.prod(cell.weight.shape)) * cell.weight.itemsize
    if scheme.is_float:
        shape = tuple(cell.weight.shape)
        done.reports.append(LayerReport(name, "float", "FLOAT", "none", shape, size, size, 0.0))
        return
    start = time.perf_counter()
    result = quantize_linear(name, cell, scheme, done.config, statistics, storage)
    weight_error, output_error = relative_errors(cell, result, statistics)
    replace_cell(done.network, name, quant_cell(result, activation_of(cell), layout))
    done.layers[name] = result
    if statistics is not None:
        statistics.forget_tokens()
        done.inputs[name] = statistics
    done.reports.append(
        LayerReport(
            name=name,
            scheme=str(scheme),
            type=type_name(scheme),
            method=result.method,
            shape=tuple(result.layer.codes.shape),
            bytes_before=size,
            bytes_after=result.layer.codes.size * scheme.weight.dtype.bits // 8  # type: ignore[union-attr]
            + int(np.asarray(result.layer.weight_scale).nbytes),
            weight_error=weight_error,
            output_error=output_error,
            seconds=time.perf_counter() - start,
            notes=result.layer.notes,
        )
    )


def _find_attentions(network: Any) -> dict[str, Any]:
    found = {
        name: cell
        for name, cell in network.cells_and_names()
        if hasattr(cell, "key_quant") and hasattr(cell, "value_quant")
    }
    if not found:
        raise StructureError(
            "the network has no attention cell with key_quant and value_quant, so its cache "
            "cannot be quantized",
            hint="set kvcache_dtype to None, or give the attention such cells (see FloatKV)",
        )
    return found


def _cache_scales(
    network: Any, attentions: dict[str, Any], batches: Sequence[np.ndarray], forward: Forward
) -> dict[str, CacheScales]:
    """Return symmetric scales per channel of keys (after rotation) and values."""
    cells, widths = {}, {}
    for name, attention in attentions.items():
        for side in ("key_quant", "value_quant"):
            cell = getattr(attention, side)
            cells[f"{name}.{side}"] = cell
            widths[id(cell)] = attention.kv_heads * attention.head_dim
    found = collect(
        network, cells, batches, forward=forward, channels_from=lambda cell: widths[id(cell)]
    )

    def scale(name: str) -> np.ndarray:
        return np.asarray(np.maximum(found[name].peak / np.float32(127), np.float32(EPS)))

    return {
        name: CacheScales(scale(f"{name}.key_quant"), scale(f"{name}.value_quant"))
        for name in attentions
    }


def _quantize_cache(name: str, attention: Any, scales: CacheScales | None) -> None:
    if scales is None:
        attention.key_quant, attention.value_quant = TokenKV(), TokenKV()
        return
    attention.key_quant = ChannelKV(scales.key, attention.kv_heads)
    attention.value_quant = ChannelKV(scales.value, attention.kv_heads)

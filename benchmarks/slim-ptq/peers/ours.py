"""The same cases with slim-ptq: through a checkpoint on disk where a format holds the scheme."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import Scheme
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from slim_core.dtypes import IntType
from slim_core.groups import group_by
from slim_core.method import MethodSpec
from slim_core.recipe import Recipe
from slim_core.scheme import Granularity, QuantScheme, TensorScheme
from slim_ptq import quantize
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.calibration.capture import capture_calls, first_call, output_form
from slim_ptq.calibration.hidden import HiddenStates
from slim_ptq.calibration.moments import Moments
from slim_ptq.load import load_model
from slim_ptq.methods import LayerInputs, Needs, SignRound, make_method
from slim_ptq.methods.grid import WeightGrid
from slim_ptq.rounding import RoundedStream
from slim_ptq.structure import find_blocks, find_linears, trace_block
from slim_ptq.transforms import (
    BlockAwq,
    BlockData,
    LinkStatistics,
    choose_links,
    suppress_block,
)

FIRST = {
    "awq": {"smooth": "awq"},
    "smoothquant": {"smooth": {"method": "smoothquant", "alpha": 0.8}},  # as the peer's
    "rotation": {"rotate": {}},
}


def quantized(model: Path, calibration: Path, scheme: Scheme, method: str) -> Any:
    """Return a model that computes what an engine would."""
    ids = load_file(calibration)["ids"]
    if scheme.bits == 3:
        return _without_format(model, ids, scheme, method)
    *first, last = method.split("+")
    values: dict[str, Any] = {"scheme": scheme.name, "method": _spec(last, scheme)}
    for part in first:
        values |= FIRST[part]
    if last == "flatquant":
        values["scheme"] = "w4a4_flatquant_dynamic"
    with tempfile.TemporaryDirectory() as folder:
        texts, out = Path(folder) / "ids.jsonl", Path(folder) / "out"
        texts.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
        recipe = Recipe.build(**values)
        count, length = ids.shape
        quantize(model, out, recipe=recipe, calibration=texts, samples=count, length=length)
        return load_model(out)


def _spec(method: str, scheme: Scheme) -> Any:
    """Return a method as recipes name it, with the range and the zero points of its peers."""
    if method == "hqq" and not scheme.symmetric:
        return {"name": "hqq", "float_offset": True}
    if method == "minmax" and scheme.symmetric:
        return {"name": "minmax", "full_range": True}
    return method


def _without_format(model: Path, ids: torch.Tensor, scheme: Scheme, method: str) -> Any:
    """Put the weights that the codes stand for into the float model."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    *first, last = method.split("+")
    granularity = Granularity.PER_GROUP if scheme.group else Granularity.PER_CHANNEL
    kind = TensorScheme(IntType(scheme.bits), granularity, scheme.symmetric, scheme.group)
    put_codes(loaded, ids, kind, MethodSpec.parse(_spec(last, scheme)), smooth="awq" in first)
    return loaded


def put_codes(
    model: nn.Module,
    ids: torch.Tensor,
    kind: TensorScheme,
    method: MethodSpec,
    *,
    smooth: bool = False,
) -> None:
    """Quantize a model in memory block by block, as recipes do, for schemes without a format."""
    maker = make_method(method)
    rounded = RoundedStream(HiddenStates())
    for name, samples in _blocks(model, ids):
        block = model.get_submodule(name)
        linears = find_linears(block)
        if smooth:
            _smooth(block, samples, QuantScheme(kind, None), method)
        if isinstance(maker, SignRound):
            layers = dict.fromkeys(linears, (maker, kind))
            parts = rounded.block(name, block, samples, layers)
        else:
            inputs = _inputs(block, samples, linears, maker.needs)
            parts = {
                local: maker.quantize(local, linear.weight, kind, inputs.get(local))
                for local, linear in linears.items()
            }
        for local, made in parts.items():
            grid = WeightGrid(kind, made.scale, made.offset)
            linears[local].weight.data = grid.values(made.codes)


def _blocks(model: nn.Module, ids: torch.Tensor) -> Iterator[tuple[str, BlockSamples]]:
    """Yield the blocks with what they read and give in floating point."""
    names = find_blocks(model)
    args, kwargs = first_call(model, names[0], ids[:1])
    with torch.no_grad():
        form = output_form(model.get_submodule(names[0])(*args, **kwargs))
    hidden, calls = HiddenStates(), []
    for batch in torch.split(ids, 4):
        entry, call = capture_calls(model, names, batch, form)
        hidden.append(entry)
        calls.append(call)
    for index, name in enumerate(names):
        block = model.get_submodule(name)
        with torch.no_grad():
            for batch, call in enumerate(calls):
                hidden.put(batch, call.run(block, index, hidden[batch]))
        yield name, BlockSamples(index, calls, hidden)
        hidden.advance()


def _inputs(
    block: nn.Module, samples: BlockSamples, linears: dict[str, nn.Module], needs: Needs
) -> dict[str, LayerInputs]:
    """Return what the inputs of the layers of a block are like."""
    if not needs:
        return {}
    seen = {}
    for members in group_by(linears, "input").values():
        seen |= dict.fromkeys(members, Moments(needs))
    handles = [
        linears[members[0]].register_forward_pre_hook(
            lambda _module, args, moments=seen[members[0]]: moments.add(args[0])
        )
        for members in group_by(linears, "input").values()
    ]
    with torch.no_grad():
        for batch in range(len(samples)):
            samples.run(block, batch)
    for handle in handles:
        handle.remove()
    return {local: moments.inputs() for local, moments in seen.items()}


def _smooth(
    block: nn.Module, samples: BlockSamples, scheme: QuantScheme, method: MethodSpec
) -> None:
    """Scale the links of a block by AWQ."""
    awq = BlockAwq()
    calls, index = samples.calls[0], samples.index
    trace = trace_block(block, (samples.hidden[0], *calls.args[index]), calls.kwargs[index])
    links, _ = choose_links(trace, awq.kinds, {})
    with LinkStatistics(block, links) as statistics, torch.no_grad():
        for batch in range(len(samples)):
            samples.run(block, batch)
    linears = find_linears(block)
    data = BlockData(samples, dict.fromkeys(linears, method))
    schemes = dict.fromkeys(linears, scheme)
    suppress_block(block, links, statistics, awq, schemes, data=data)

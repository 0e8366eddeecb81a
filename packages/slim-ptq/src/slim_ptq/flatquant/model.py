"""Training the blocks of a model in memory, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slim_core.errors import CalibrationError, NumericalError
from slim_core.logging import get_logger
from slim_core.progress import track
from slim_core.scheme import QuantScheme
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.calibration.capture import BlockCalls, capture_run, output_form
from slim_ptq.calibration.hidden import HiddenStates
from slim_ptq.calibration.samples import Sample, run_sample, shortest
from slim_ptq.flatquant.train import train_block
from slim_ptq.methods import FlatQuant, LayerInputs
from slim_ptq.offload import resident
from slim_ptq.structure import BlockTrace, find_blocks, trace_block

_log = get_logger("ptq")


def train_model(
    model: nn.Module,
    samples: Sequence[Sample],
    methods: Mapping[str, FlatQuant],
    schemes: Mapping[str, QuantScheme],
) -> dict[str, LayerInputs]:
    """Train all blocks of a model; each gets the outputs of the float block before it.

    Parameters
    ----------
    model : nn.Module
        In floating point and evaluation mode.  It stays the same function: channel scales move
        between its weights.
    samples : sequence of list or dict
        At least one.
    methods : mapping
        How the layers to train, by their names, are trained.
    schemes : mapping
        How these layers will be quantized.

    Returns
    -------
    dict
        What was learned of each layer that was run.

    Raises
    ------
    StructureError
        The model has no decoder blocks.
    CalibrationError
        The model cannot run on a sample.
    NumericalError
        A block gives NaN or infinity; names it.
    """
    blocks = find_blocks(model)
    calls, hidden = _captured(model, blocks, samples)
    found: dict[str, LayerInputs] = {}
    short = shortest(samples)[0]
    for index, name in enumerate(track(blocks, "Training blocks")):
        prefix = f"{name}."
        block = model.get_submodule(name)
        mine = {
            layer.removeprefix(prefix): method
            for layer, method in methods.items()
            if layer.startswith(prefix)
        }
        with resident(block, changed=True):
            inputs = BlockSamples(index, calls, hidden)
            for batch in range(len(inputs)):
                with torch.no_grad():
                    hidden.put(batch, inputs.run(block, batch))
            if mine:
                trace = _trace(name, block, index, calls[short], hidden[short])
                kinds = {local: schemes[prefix + local] for local in mine}
                learned = train_block(name, block, trace, mine, kinds, inputs)
                for local, what in learned.items():
                    found[prefix + local] = LayerInputs(inputs.tokens, learned=what)
        hidden.advance()
    for layer in methods.keys() - found.keys():
        _log.warning("%s lies in no block that was trained: its transforms are identities", layer)
    return found


def _trace(
    name: str, block: nn.Module, index: int, call: BlockCalls, hidden: torch.Tensor
) -> BlockTrace:
    try:
        return trace_block(block, (hidden, *call.args[index]), call.kwargs[index])
    except NumericalError as error:
        raise NumericalError(f"{name}: {error.message}", hint=error.hint) from error


def _captured(
    model: nn.Module, blocks: Sequence[str], samples: Sequence[Sample]
) -> tuple[list[BlockCalls], HiddenStates]:
    """Return the arguments of all blocks, and the inputs of the first one."""
    form = _form(model, blocks[0], samples)
    hidden = HiddenStates()
    calls = []
    for number, sample in enumerate(samples):

        def run(number: int = number, sample: Sample = sample) -> None:
            run_sample(model, number, sample)

        start, call = capture_run(model, blocks, run, form)
        call.args = [tuple(_no_cache(arg) for arg in args) for args in call.args]
        call.kwargs = [
            {key: _no_cache(value) for key, value in kwargs.items()} for kwargs in call.kwargs
        ]
        hidden.append(start)
        calls.append(call)
    return calls, hidden


def _form(model: nn.Module, block: str, samples: Sequence[Sample]) -> tuple[None, ...] | None:
    """Return what a block returns beside the hidden states."""
    forms: list[tuple[None, ...] | None] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        forms.append(output_form(output))

    handle = model.get_submodule(block).register_forward_hook(hook)
    try:
        with torch.no_grad():
            run_sample(model, *shortest(samples))
    finally:
        handle.remove()
    if not forms:
        raise CalibrationError(f"{block} is not called when the model runs on calib_data")
    return forms[0]


def _no_cache(value: Any) -> Any:
    """Return no key-value cache, which every further pass over the block would add to."""
    return None if hasattr(value, "get_seq_length") else value

"""Blocks learned one after the other, each on what the quantized blocks before it give.

With the outputs of the float block as the target, what is learned makes up for the errors of the
blocks before as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from slim_core.groups import group_by
from slim_core.scheme import TensorScheme
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.calibration.hidden import HiddenStates
from slim_ptq.calibration.moments import Moments
from slim_ptq.methods import Needs, Parts, SignRound
from slim_ptq.rounding.linear import RoundedLinear, Start
from slim_ptq.rounding.train import train_rounding
from slim_ptq.structure import replaced, weight_of


class RoundedStream:
    """Learns the rounding of block after block.

    Parameters
    ----------
    hidden : HiddenStates
        Empty; for the inputs of the blocks.
    """

    def __init__(self, hidden: HiddenStates) -> None:
        self.hidden = hidden

    def block(
        self,
        name: str,
        block: nn.Module,
        samples: BlockSamples,
        layers: Mapping[str, tuple[SignRound, TensorScheme]],
    ) -> dict[str, Parts]:
        """Learn the rounding of a block; the next call is for the next block.

        Parameters
        ----------
        name : str
            Of the block in the checkpoint.
        block : nn.Module
            In floating point, as it is again afterwards.
        samples : BlockSamples
            Inputs and outputs of the float block.
        layers : mapping
            How to quantize layers, by their local names; all others stay as they are.  The options
            of the first hold for the block.

        Returns
        -------
        dict
            Of the layers that a token reached.
        """
        if not len(self.hidden):
            self._enter(samples)
        inputs = _Inputs(samples, self.hidden)
        starts = self._starts(name, block, inputs, layers)
        if starts:
            options = next(iter(layers.values()))[0]
            made = train_rounding(
                name,
                block,
                starts,
                inputs,
                iterations=options.iterations,
                rate=options.block_rate,
                seed=samples.index,
            )
            starts = {local: replace(starts[local], parts=parts) for local, parts in made.items()}
        self._leave(block, inputs, starts)
        return {local: start.parts for local, start in starts.items()}

    def _enter(self, samples: BlockSamples) -> None:
        for hidden in samples.hidden:
            self.hidden.append(hidden)
        if self.hidden.is_resumed:
            self.hidden.restore()

    def _starts(
        self,
        name: str,
        block: nn.Module,
        inputs: _Inputs,
        layers: Mapping[str, tuple[SignRound, TensorScheme]],
    ) -> dict[str, Start]:
        """Return the codes to start from, chosen for the inputs of each layer in this block."""
        moments: dict[str, Moments] = {}
        handles = []
        for members in group_by(layers, "input").values():
            shared = Moments(Needs.HESSIAN)
            moments |= dict.fromkeys(members, shared)
            handles.append(
                block.get_submodule(members[0]).register_forward_pre_hook(
                    lambda _module, args, shared=shared: shared.add(args[0])
                )
            )
        try:
            with torch.no_grad():
                for batch in range(len(inputs)):
                    inputs.run(block, batch)
        finally:
            for handle in handles:
                handle.remove()
        starts = {}
        for local, (method, scheme) in layers.items():
            seen = moments[local].inputs()
            if seen.count:
                weight = weight_of(block.get_submodule(local))
                parts = method.start(f"{name}.{local}", weight, scheme, seen)
                starts[local] = Start(parts, scheme)
        return starts

    def _leave(self, block: nn.Module, inputs: _Inputs, made: Mapping[str, Start]) -> None:
        """Run the quantized block for the inputs of the next one."""
        layers = {
            local: RoundedLinear(block.get_submodule(local), start) for local, start in made.items()
        }
        with replaced(block, layers), torch.no_grad():
            for batch in range(len(inputs)):
                self.hidden.put(batch, inputs.run(block, batch))
        self.hidden.advance()


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Batches with inputs of quantized blocks, and outputs of float ones as targets."""

    samples: BlockSamples
    hidden: HiddenStates

    def __len__(self) -> int:
        return len(self.samples)

    def run(self, block: nn.Module, batch: int) -> torch.Tensor:
        calls = self.samples.calls[batch]
        return calls.run(block, self.samples.index, self.hidden[batch])

    def target(self, batch: int) -> torch.Tensor:
        return self.samples.target(batch)

"""The calibration data of one decoder block: its inputs, and what it gave for them in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slim_ptq.calibration.capture import BlockCalls
from slim_ptq.calibration.hidden import HiddenStates


@dataclass(frozen=True, eq=False)
class BlockSamples:
    """Batches of a block.

    Parameters
    ----------
    index : int
        Number of the block.
    calls : sequence of BlockCalls
        The further arguments, a batch each.
    hidden : HiddenStates
        The inputs; the outputs have been put, and have not become the inputs of the next block.
    """

    index: int
    calls: Sequence[BlockCalls]
    hidden: HiddenStates

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def tokens(self) -> int:
        """Number of tokens in all batches."""
        return sum(x.shape[:-1].numel() for x in self.hidden)

    def run(self, block: nn.Module, batch: int) -> torch.Tensor:
        """Return the output of the block, as it is now, for a batch."""
        return self.calls[batch].run(block, self.index, self.hidden[batch])

    def target(self, batch: int) -> torch.Tensor:
        """Return the output of the float block for a batch."""
        return self.hidden.output(batch)

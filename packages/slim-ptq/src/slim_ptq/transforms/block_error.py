"""How much the output of a block loses when the readers of a link are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from slim_core.method import MethodSpec
from slim_core.scheme import QuantScheme
from slim_ptq.calibration.block_samples import BlockSamples
from slim_ptq.methods import MinMax, Needs, make_method
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.parallel import Team
from slim_ptq.structure import Link, bias_of, replaced
from slim_ptq.transforms.base import Reader
from slim_ptq.transforms.error import quantized_reader
from slim_ptq.transforms.statistics import ChannelStats

_ALL_CODES = MethodSpec.parse({"name": MinMax.name, "full_range": True})


@dataclass(frozen=True, eq=False)
class BlockData:
    """What a block is judged on.

    Parameters
    ----------
    samples : BlockSamples
        Inputs and outputs of the float block.
    methods : mapping
        How the weights of layers will be quantized, by their local names.
    team : Team
        Processes that hold the other samples; all of them come to the same error.
    """

    samples: BlockSamples
    methods: Mapping[str, MethodSpec]
    team: Team = field(default_factory=Team)

    def batches(self, tokens: int) -> range:
        """Return the numbers of evenly chosen batches that hold so many tokens, if all do."""
        count = len(self.samples)
        wanted = -(-tokens * count // (self.samples.tokens * self.team.size))
        return range(0, count, max(1, count // max(1, wanted)))


class BlockError:
    """The squared error of the output of a block as a function of the scales of a link.

    The readers of the link are quantized, by the method that follows if that needs no calibration
    data, else to nearest; all other layers compute in floating point.  The scales are undone at the
    input of each reader, so that the source of the link stays as it is.

    Parameters
    ----------
    block : nn.Module
        In floating point, as it is again after each call.
    link : Link
    stats : ChannelStats
        Of what the readers read.
    readers : mapping
        By their local names.
    data : BlockData
    tokens : int
        On how many tokens at least, if there are so many.
    """

    def __init__(
        self,
        block: nn.Module,
        link: Link,
        stats: ChannelStats,
        readers: Mapping[str, Reader],
        data: BlockData,
        tokens: int,
    ) -> None:
        self._block, self._stats, self._data = block, stats, data
        self._index = link.targets[0].index
        self._batches = data.batches(tokens)
        self._readers = {
            name: Reader(reader.weight.detach().float(), reader.scheme)
            for name, reader in readers.items()
        }

    def __call__(self, scales: torch.Tensor) -> float:
        """Return the error for scales of the source's channels, ``[link.width]``."""
        columns = scales.float()[self._index.to(scales.device)]
        layers = {
            name: self._layer(name, reader, columns) for name, reader in self._readers.items()
        }
        samples, total = self._data.samples, 0.0
        with replaced(self._block, layers), torch.no_grad():
            for batch in self._batches:
                gap = samples.run(self._block, batch).float() - samples.target(batch).float()
                total += float(gap.square().sum())
        return sum(self._data.team.gather(total))

    def _layer(self, name: str, reader: Reader, columns: torch.Tensor) -> nn.Module:
        bias = bias_of(self._block.get_submodule(name))
        layer = quantized_reader(
            reader,
            columns,
            self._stats,
            method=_nearest(self._data.methods[name], reader.scheme),
            bias=None if bias is None else bias.detach().float(),
        )
        return _Unscaled(layer, columns)


def _nearest(method: MethodSpec, scheme: QuantScheme) -> MethodSpec | None:
    """Return the method if it needs no data, else rounding to nearest, on all codes if possible."""
    if make_method(method).needs is Needs.NONE:
        return method
    return _ALL_CODES if make_method(_ALL_CODES).unsupported(scheme) is None else None


class _Unscaled(nn.Module):
    """A layer for the inputs before they are scaled."""

    def __init__(self, layer: FakeQuantLinear, columns: torch.Tensor) -> None:
        super().__init__()
        self._layer, self._columns = layer, columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._layer(x.float() / self._columns)
        return output.to(x.dtype)

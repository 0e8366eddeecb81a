"""Outlier suppression of one block within the blockwise pipeline."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from slim_core.errors import NumericalError
from slim_core.logging import get_logger
from slim_core.recipe import Smooth, SmoothMethod
from slim_ptq.pipeline.blocks import BlockRunner
from slim_ptq.structure import LinkKind, trace_block
from slim_ptq.transforms import LinkStatistics, SmoothQuant, ThresholdSmooth, suppress_block
from slim_ptq.transforms.suppress import ScaleMethod

_log = get_logger("ptq")


def smooth_block(
    runner: BlockRunner,
    block: nn.Module,
    index: int,
    name: str,
    smooth: Smooth,
    float_layers: Collection[str],
) -> tuple[str, ...]:
    """Move activation outliers of a block into its weights; its output stays what it is.

    Parameters
    ----------
    name : str
        Of the block, for messages.
    float_layers : collection of str
        Local names of layers that stay in floating point and have no say in the scales.

    Returns
    -------
    tuple of str
        Why norms were left as they are, one reason a norm.
    """
    try:
        trace = trace_block(block, *runner.example(index))
    except NumericalError as error:
        raise NumericalError(f"{name}: {error.message}", hint=error.hint) from error
    links = [link for link in trace.links if link.kind is LinkKind.NORM_LINEAR]
    method = _method(smooth)
    statistics = LinkStatistics(block, links, tokens=method.tokens, prefix=name)
    with statistics:
        runner.look(block, index)
    suppress_block(block, links, statistics, method, prefix=name, float_layers=float_layers)
    return tuple(
        f"{name}.{item.link.source}: {item.reason}"
        for item in trace.rejected
        if item.link.kind is LinkKind.NORM_LINEAR
    )


def _method(smooth: Smooth) -> ScaleMethod:
    if smooth.method is SmoothMethod.SMOOTHQUANT:
        return SmoothQuant(smooth.alpha)
    return ThresholdSmooth(smooth.alpha)

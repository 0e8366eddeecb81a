"""Second moments of the inputs of layers, gathered batch by batch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slim_core.groups import group_by
from slim_core.numerics import check_finite
from slim_ptq.calibration.samples import Sample, feed
from slim_ptq.methods import LayerInputs, Needs
from slim_ptq.parallel import Team

_MOST_BYTES = 4 << 30  # of the moments of the layers that are watched in one pass


class Moments:
    """Mean square or mean of ``x xᵀ`` over all tokens that were added, in float32.

    Nothing can be added once :meth:`inputs` was called: the mean takes the place of the sum.
    """

    def __init__(self, needs: Needs) -> None:
        self._needs = needs & ~Needs.BLOCK
        self._count = 0
        self._sum: torch.Tensor | None = None
        self._inputs: LayerInputs | None = None

    def add(self, x: torch.Tensor) -> None:
        """Take in tokens, shape (..., channels), which are finite."""
        assert self._inputs is None
        rows = x.detach().reshape(-1, x.shape[-1])
        self._count += rows.shape[0]
        if not self._needs:
            return
        rows = rows.float()
        if Needs.HESSIAN not in self._needs:
            squares = rows.square().sum(dim=0)
            self._sum = squares if self._sum is None else self._sum.add_(squares)
        elif self._sum is None:
            self._sum = rows.T @ rows
        else:
            self._sum.addmm_(rows.T, rows)

    def combine(self, team: Team) -> None:
        """Become, in every process, the moments of the tokens of all of them."""
        assert self._inputs is None
        counts = team.gather((self._count, None if self._sum is None else self._sum.shape))
        self._count = sum(count for count, _ in counts)
        shape = next((shape for _, shape in counts if shape is not None), None)
        if shape is not None:
            own = torch.zeros(shape) if self._sum is None else self._sum
            self._sum = team.sum(own)

    def inputs(self) -> LayerInputs:
        """Return what methods see, the same object each time."""
        if self._inputs is None:
            mean = None if self._sum is None else self._sum.div_(self._count)
            full = Needs.HESSIAN in self._needs and mean is not None
            self._inputs = LayerInputs(
                self._count,
                mean if full else None,
                mean.diagonal() if full and mean is not None else mean,
            )
        return self._inputs


def model_inputs(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    needs: Mapping[str, Needs],
    samples: Sequence[Sample],
) -> Iterator[dict[str, LayerInputs]]:
    """Run a model in memory on all samples and yield what the inputs of its layers were like.

    Layers that read one tensor share one object.  As many layers are watched at once as
    4 GiB of moments allow: larger models are run several times.

    Parameters
    ----------
    linears : mapping
        Modules by their names.
    needs : mapping
        What is wanted of each layer; layers that need nothing are left out.

    Raises
    ------
    NumericalError
        An input is NaN or infinite; names the layer.
    CalibrationError
        The model cannot run on a sample.
    """
    wanted = [name for name in linears if needs.get(name, Needs.NONE) & ~Needs.BLOCK]
    chunk: dict[str, list[str]] = {}
    size = 0
    for group, members in group_by(wanted, "input").items():
        width: Any = linears[members[0]].weight.shape  # of either orientation
        own = 4 * max(width) ** 2
        if chunk and size + own > _MOST_BYTES:
            yield _watched(model, linears, needs, samples, chunk)
            chunk, size = {}, 0
        chunk[group] = members
        size += own
    if chunk:
        yield _watched(model, linears, needs, samples, chunk)


def _watched(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    needs: Mapping[str, Needs],
    samples: Sequence[Sample],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, LayerInputs]:
    """Return the inputs of groups of layers after one pass over the samples."""

    def watch(name: str, moments: Moments) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            check_finite(name, "input", inputs[0])
            moments.add(inputs[0])

        return hook

    found: dict[str, Moments] = {}
    handles = []
    for members in groups.values():
        moments = Moments(functools.reduce(operator.or_, (needs[name] for name in members)))
        found |= dict.fromkeys(members, moments)
        first = members[0]
        handles.append(linears[first].register_forward_pre_hook(watch(first, moments)))
    try:
        for _ in feed(model, samples, "Watching inputs"):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments.inputs() for name, moments in found.items()}

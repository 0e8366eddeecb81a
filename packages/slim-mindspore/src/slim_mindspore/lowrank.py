"""Low-rank decomposition of MindSpore networks: the compatible ``Decompose``.

Ranks and factors come from the framework-free half of slim-lowrank, so a network gets the ranks
that its PyTorch twin gets.  Under the name ``L`` of the layer:

===========  ==========================================================================
Dense        ``L.0.weight``, ``L.1.weight``, ``L.1.bias``
Embedding    ``L.0.embedding_table``, ``L.1.weight``
Conv2d       ``L.0.weight`` (1 x 1), ``L.1.weight``, ``L.2.weight`` (1 x 1), ``L.2.bias``
===========  ==========================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from slim_core.errors import CalibrationError, InvalidTypeError
from slim_core.logging import get_logger
from slim_lowrank.compat_base import DecomposeBase
from slim_lowrank.rank_requests import LayerShape, Ranks
from slim_mindspore.framework import nn
from slim_mindspore.linears import is_linear, replace_cell, weight_of
from slim_mindspore.lowrank_cells import (
    conv_triple,
    dense_pair,
    embedding_pair,
    float_array,
)
from slim_mindspore.modes import pynative
from slim_mindspore.statistics import InputStatistics, watch

logger = get_logger("mindspore")


def count_parameters(network: Any) -> int:
    """Return the number of elements of all parameters, moving statistics of norms included.

    Raises
    ------
    InvalidTypeError
        ``network`` is no Cell.
    """
    if not isinstance(network, nn.Cell):
        raise InvalidTypeError(f"network must be Cell, not {type(network).__name__}")
    shapes = (parameter.shape for parameter in network.parameters_dict(recurse=True).values())
    return int(sum(int(np.prod(shape)) for shape in shapes))


class Decompose(DecomposeBase):
    """Replace Dense, Embedding and Conv2d cells by products of smaller ones.

    ::

        network = Decompose(network).from_ratio(0.5).decompose_network()

    The ``Linear`` of MindFormers is taken as a Dense.  Grouped convolutions, and a network that is
    itself such a cell, stay as they are.  See
    :class:`slim_lowrank.compat_base.DecomposeBase` for the parameters and the ``from_...`` methods.
    """

    framework = "mindspore.nn.Cell"

    def _is_model(self, model: Any) -> bool:
        return isinstance(model, nn.Cell)

    def _cells(self) -> dict[str, Any]:
        return {
            name: cell
            for name, cell in self.model.cells_and_names()
            if name and _kind(cell) is not None
        }

    def _layers(self) -> Mapping[str, LayerShape]:
        layers = {}
        for name, cell in self._cells().items():
            kind: Any = _kind(cell)
            layers[name] = LayerShape(kind, _weight(cell).shape)
        return layers

    def _weight(self, name: str) -> np.ndarray:
        return _weight(self._cells()[name])

    def decompose_network(
        self,
        do_decompose_weight: bool = True,
        datasets: Iterable[Any] | None = None,
        max_iter: int = -1,
    ) -> Any:
        """Decompose the network in place and return it.

        Parameters
        ----------
        do_decompose_weight : bool
            False changes the structure only, for ranks that load the weights from a file.
        datasets : iterable, optional
            Batches, each a dict of keyword arguments or a list or tuple of positional ones.  With
            them, Dense and Conv2d cells keep their outputs on this data, not their weights.
        max_iter : int
            How many batches to use; 0 and -1 mean all.

        Raises
        ------
        InvalidTypeError
            ``do_decompose_weight`` is no bool, ``max_iter`` no int, or a batch none of the above.
        InvalidValueError
            No ``from_...`` method ran yet, ``max_iter`` is below -1, or the ranks do not fit.
        CalibrationError
            There are no batches, or they do not reach a cell.
        """
        config = self._check_call(do_decompose_weight, max_iter)
        cells = self._cells()
        seen: dict[str, InputStatistics] = {}
        if datasets is not None and do_decompose_weight:
            watched = {
                name: cells[name] for name in config if not isinstance(cells[name], nn.Embedding)
            }
            seen = _collect(self.model, watched, datasets, max_iter)
        for name, ranks in config.items():
            new = _replacement(name, cells[name], ranks, do_decompose_weight, seen.get(name))
            new.set_train(cells[name].training)
            replace_cell(self.model, name, new)
        self.model.update_parameters_name()
        return self.model


def _replacement(
    name: str, cell: Any, ranks: Ranks, with_weights: bool, seen: InputStatistics | None
) -> Any:
    second = None if seen is None else seen.hessian / 2.0
    if isinstance(ranks, tuple):
        return conv_triple(name, cell, ranks, with_weights, second)
    if isinstance(cell, nn.Embedding):
        return embedding_pair(name, cell, ranks, with_weights)
    return dense_pair(name, cell, ranks, with_weights, second)


def _kind(cell: Any) -> str | None:
    if isinstance(cell, nn.Embedding):
        return "embedding"
    if isinstance(cell, nn.Conv2d):
        return "conv" if cell.group == 1 else None
    return "linear" if is_linear(cell) else None


def _weight(cell: Any) -> np.ndarray:
    if isinstance(cell, nn.Embedding):
        return float_array(cell.embedding_table)
    return float_array(cell.weight) if isinstance(cell, nn.Conv2d) else weight_of(cell)


def _collect(
    network: Any, cells: Mapping[str, Any], datasets: Iterable[Any], max_iter: int
) -> dict[str, InputStatistics]:
    """Return the statistics of the inputs; those of a convolution are its pixels."""
    found = {name: InputStatistics(name, hessian=True) for name in cells}
    limit = max_iter if max_iter > 0 else None
    count = 0
    with pynative():
        handles = [watch(cell, found[name]) for name, cell in cells.items()]
        try:
            for batch in itertools.islice(datasets, limit):
                if isinstance(batch, Mapping):
                    network(**batch)
                elif isinstance(batch, (list, tuple)):
                    network(*batch)
                else:
                    kind = type(batch).__name__
                    raise InvalidTypeError(f"datasets[{count}] must be dict or list, not {kind}")
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    silent = [name for name, statistics in found.items() if not statistics.tokens]
    if not count or silent:
        where = f"never reached {', '.join(silent[:5])}" if count else "hold no batch"
        raise CalibrationError(f"the datasets {where}")
    return found

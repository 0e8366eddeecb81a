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

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_lowrank.allocate import Option, allocate
from slim_lowrank.compat_base import DecomposeBase, check_divisor, check_excludes
from slim_lowrank.rank_requests import LayerShape, Ranks
from slim_lowrank.ranks import check_ratio, matrix_params, matrix_pays
from slim_lowrank.table import LayerRanks
from slim_mindspore.framework import nn
from slim_mindspore.linears import bias_of, is_linear, replace_cell, weight_of
from slim_mindspore.lowrank_cells import (
    conv_triple,
    dense_pair,
    embedding_pair,
    float_array,
)
from slim_mindspore.moments import LayerMoments, Loss, collect_moments

if TYPE_CHECKING:
    from typing_extensions import Self


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
        network = Decompose(network).from_budget(0.7, batches).decompose_network()

    The ``Linear`` of MindFormers is taken as a Dense.  Grouped convolutions, and a network that is
    itself such a cell, stay as they are.  See
    :class:`slim_lowrank.compat_base.DecomposeBase` for the parameters and the ``from_...`` methods.
    """

    framework = "mindspore.nn.Cell"

    def __init__(self, model: Any, config_file: str | None = None) -> None:
        super().__init__(model, config_file)
        self._seen: dict[str, LayerMoments] = {}
        self._seen_for: dict[str, Ranks] | None = None

    def from_budget(
        self,
        share: float,
        datasets: Iterable[Any],
        *,
        loss: Loss | None = None,
        excludes: list[str] | tuple[str, ...] | None = None,
        divisor: int = 64,
        max_iter: int = -1,
    ) -> Self:
        """Keep a share of the weights of all linear cells together, where data says they matter.

        A cell whose factors would cost too much for what they keep stays dense, and
        :meth:`decompose_network` without ``datasets`` takes the statistics collected here.
        Embeddings and convolutions stay dense.

        Parameters
        ----------
        share : float
            Of the weights of all linear cells not excluded, strictly between 0 and 1.
        datasets, max_iter
            As in :meth:`decompose_network`.
        loss : callable, optional
            ``loss(output, batch)`` gives a scalar Tensor, for example
            :func:`slim_mindspore.next_token_loss`.  Factors then keep the loss, in the metric of
            its gradients by the output of each cell (for a cell with an activation, behind it);
            without it, the same share of each cell's output energy counts the same.
        excludes, divisor
            As in :meth:`from_ratio`.

        Raises
        ------
        PlanError
            Even the smallest ranks cost more.
        InvalidTypeError, InvalidValueError, CalibrationError
            As :meth:`from_ratio` and :meth:`decompose_network`.
        """
        check_ratio("share", share)
        excluded, divisor = check_excludes(excludes), check_divisor(divisor)
        cells = {
            name: cell
            for name, cell in self._cells().items()
            if _kind(cell) == "linear" and name not in excluded
        }
        if not cells:
            raise InvalidValueError("the network has no linear cell that is not excluded")
        seen = collect_moments(self.model, cells, datasets, max_iter, loss)
        options = {name: _options(name, cell, seen[name], divisor) for name, cell in cells.items()}
        dense = sum(max(option.cost for option in each) for each in options.values())
        chosen = {name: option.ranks for name, option in allocate(options, share * dense).items()}
        self._set({name: ranks.ranks[0] for name, ranks in chosen.items() if ranks is not None})
        self._seen, self._seen_for = seen, self.decompose_config
        return self

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
            them, Dense and Conv2d cells keep their outputs on this data, not their weights, and
            the bias of a Dense makes up for the mean error.
        max_iter : int
            How many batches to use; 0 and -1 mean all.

        Raises
        ------
        InvalidTypeError
            ``do_decompose_weight`` is no bool, ``max_iter`` no int, or a batch none of the above.
        InvalidValueError
            No ``from_...`` method ran yet, ``max_iter`` is below -1, or the ranks do not fit.
        CalibrationError
            There are no batches, they do not reach a cell, or it saw too few positions for its
            rank.
        """
        config = self._check_call(do_decompose_weight, max_iter)
        cells = self._cells()
        seen = self._seen if self._seen_for is self.decompose_config else {}
        if datasets is not None and do_decompose_weight:
            watched = {
                name: cells[name] for name in config if not isinstance(cells[name], nn.Embedding)
            }
            seen = collect_moments(self.model, watched, datasets, max_iter)
        for name, moments in seen.items():
            if name in config:
                moments.check_rank(max(np.atleast_1d(config[name])))
        for name, ranks in config.items():
            new = _replacement(name, cells[name], ranks, do_decompose_weight, seen.get(name))
            new.set_train(cells[name].training)
            replace_cell(self.model, name, new)
        self.model.update_parameters_name()
        return self.model


def _replacement(
    name: str, cell: Any, ranks: Ranks, with_weights: bool, seen: LayerMoments | None
) -> Any:
    if isinstance(ranks, tuple):
        return conv_triple(name, cell, ranks, with_weights, seen)
    if isinstance(cell, nn.Embedding):
        return embedding_pair(name, cell, ranks, with_weights)
    return dense_pair(name, cell, ranks, with_weights, seen)


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


def _options(name: str, cell: Any, seen: LayerMoments, divisor: int) -> list[Option]:
    """Return what a linear cell can become: every rank of the grid that pays, and dense."""
    seen.check_rank(divisor)
    weight = weight_of(cell)
    rows, columns = weight.shape
    has_bias = bias_of(cell) is not None
    problem = seen.problem(weight, centred=has_bias)
    total = float(problem.losses[0])
    scale = 1.0 if seen.gradients is not None else 1.0 / max(total, np.finfo(float).tiny)
    found = [Option(float(rows * columns), 0.0, None)]
    for rank in range(divisor, min(rows, columns, seen.rows - 1) + 1, divisor):
        if matrix_pays(rank, rows, columns):
            ranks = LayerRanks(name, "linear", (rows, columns), "factors", (rank,), has_bias)
            cost = float(matrix_params(rank, rows, columns))
            found.append(Option(cost, scale * float(problem.losses[rank]), ranks))
    return found

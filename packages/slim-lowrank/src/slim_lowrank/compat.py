"""msModelSlim-compatible face for PyTorch: ``Decompose``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from slim_core.logging import get_logger
from slim_lowrank.calibrate import collect
from slim_lowrank.compat_base import DecomposeBase
from slim_lowrank.factorize import Array
from slim_lowrank.layers import COMPATIBLE_KINDS, Layer, find_layers, weight_array
from slim_lowrank.rank_requests import LayerShape, Ranks
from slim_lowrank.solve import flat_weight, solve_plain, solve_with_data
from slim_lowrank.surgery import apply_table, drop_broken_ties
from slim_lowrank.table import LayerRanks

logger = get_logger("lowrank")

_KINDS: dict[str, Literal["linear", "embedding", "conv"]] = {
    "linear": "linear",
    "embedding": "embedding",
    "conv2d": "conv",
}


class Decompose(DecomposeBase):
    """Replace Linear, Embedding and Conv2d layers by products of smaller ones.

    ::

        model = Decompose(model).from_ratio(0.5).decompose_network()

    Layers that cannot be decomposed (grouped convolutions, the projection inside
    ``MultiheadAttention``, parametrized or quantized weights, ...) stay as they are; the log says
    why.  See :class:`slim_lowrank.compat_base.DecomposeBase` for the parameters.
    """

    framework = "torch.nn.Module"

    def _is_model(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def _found(self) -> dict[str, Layer]:
        layers = find_layers(self.model, COMPATIBLE_KINDS)
        for layer in layers.values():
            if layer.skip is not None:
                logger.info("layer %r stays dense: %s", layer.name, layer.skip)
        return {name: layer for name, layer in layers.items() if layer.skip is None}

    def _layers(self) -> dict[str, LayerShape]:
        return {
            name: LayerShape(_KINDS[layer.kind], layer.shape)
            for name, layer in self._found().items()
        }

    def _weight(self, name: str) -> Array:
        return weight_array(self._found()[name])

    def decompose_network(
        self,
        do_decompose_weight: bool = True,
        datasets: Iterable[Any] | None = None,
        max_iter: int = -1,
    ) -> nn.Module:
        """Return a decomposed copy of the model; the model itself stays as it is.

        Parameters
        ----------
        do_decompose_weight : bool
            False changes the structure only, for ranks that load the weights from a file; the new
            layers then have PyTorch's default initialisation.
        datasets : iterable, optional
            Batches, each a dict of keyword arguments or a list or tuple of positional ones.  With
            them, Linear and Conv2d layers keep their outputs on this data, not their weights.
        max_iter : int
            How many batches to use; 0 and -1 mean all.

        Raises
        ------
        InvalidTypeError
            ``do_decompose_weight`` is no bool, ``max_iter`` no int, or a batch none of the above.
        InvalidValueError
            No ``from_...`` method ran yet, ``max_iter`` is below -1, or the ranks do not fit.
        CalibrationError
            There are no batches, or a layer saw too few positions for its rank.
        """
        table = self._table(self._check_call(do_decompose_weight, max_iter))
        model: nn.Module = copy.deepcopy(self.model)
        if not do_decompose_weight:
            return apply_table(model, table)
        if datasets is None:
            return apply_table(model, table, solve_plain)
        wanted = [name for name, ranks in table.items() if ranks.kind != "embedding"]
        limit = max_iter if max_iter > 0 else None
        seen = collect(model, wanted, datasets, max_batches=limit, halves=True)
        layers = self._found()
        for name, statistics in seen.items():
            statistics.find_shrinkage(flat_weight(layers[name]))

        def solve(layer: Layer, ranks: LayerRanks) -> Any:
            if layer.name not in seen:
                return solve_plain(layer, ranks)
            return solve_with_data(layer, ranks, seen[layer.name])

        return apply_table(model, table, solve)

    def _table(self, config: dict[str, Ranks]) -> dict[str, LayerRanks]:
        layers = self._found()
        for name, reason in drop_broken_ties(layers, config).items():
            logger.warning("layer %r stays dense: %s", name, reason)
            del config[name]
        table = {}
        for name, ranks in config.items():
            layer = layers[name]
            table[name] = LayerRanks(
                name,
                layer.kind,
                layer.shape,
                "factors" if isinstance(ranks, int) else "tucker2",
                (ranks,) if isinstance(ranks, int) else ranks,
                getattr(layer.module, "bias", None) is not None,
            )
        return table

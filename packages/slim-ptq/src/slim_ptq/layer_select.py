"""``LayerSelector``: which layers of a model in memory are hard to quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.logging import get_logger
from slim_core.matching import match_all
from slim_core.validate import check_choice, check_float, check_int, check_str_list, check_type
from slim_ptq.calibration.samples import check_samples
from slim_ptq.fallback import measure_inputs
from slim_ptq.observers import QuantileScore, SpreadObserver
from slim_ptq.structure import find_linears, unfuse_experts

_log = get_logger("ptq")

_SCORES = {"quantile": QuantileScore, "std": SpreadObserver}


class LayerSelector:
    """Ranks linear layers by how far outliers stretch the range of their input.

    Parameters
    ----------
    model : torch.nn.Module
        Experts that are kept as one tensor become separate layers, as :class:`Calibrator` has them.
    layer_names : list of str, optional
        Which linear layers to look at (names of ``Conv2d`` are accepted and not ranked); all but
        the routers of mixtures of experts if not given.
    range_method : str
        ``quantile``: the step of int8 over the distance of the quartiles.  ``std``: magnitude over
        standard deviation, the measure of ``disable_level``.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        A layer that the model does not have, or another ``range_method``.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_names: list[str] | None = None,
        range_method: str = "quantile",
    ) -> None:
        self._model = check_type("model", model, nn.Module)
        self._score = _SCORES[check_choice("range_method", range_method, _SCORES)]
        names = None if layer_names is None else check_str_list("layer_names", layer_names)
        unfuse_experts(model)
        self._linears = find_linears(model)
        if names is not None:
            self._linears = _named(model, names, self._linears)
        self._scores: dict[str, float] | None = None

    def run(self, calib_data: list[Any]) -> None:
        """Run the model on samples, each called as ``model(*sample)`` or ``model(**sample)``.

        Raises
        ------
        InvalidTypeError, InvalidValueError, CalibrationError
            A sample is no list or dict of tensors, is empty, or the model cannot run on it.
        """
        samples = check_samples("calib_data", calib_data)
        if not samples:
            raise InvalidValueError("calib_data must hold at least one sample")
        for index, sample in enumerate(samples):
            items = sample.values() if isinstance(sample, dict) else sample
            if not all(isinstance(item, torch.Tensor) for item in items):
                raise InvalidValueError(f"calib_data[{index}] must hold tensors only")
        found = measure_inputs(self._model, self._linears, samples, self._score)
        self._scores = dict(sorted(found.items(), key=lambda item: item[1], reverse=True))
        for name, score in self._scores.items():
            _log.info("%s's quantization difficulty score: %.6g", name, score)

    @property
    def scores(self) -> dict[str, float]:
        """The score of each layer, the hardest first."""
        if self._scores is None:
            raise InvalidTypeError("call run() before layers are selected")
        return dict(self._scores)

    def select_layers_by_threshold(self, threshold: float) -> list[str]:
        """Return the layers whose score is above a number of at least 0, the hardest first."""
        scores = self.scores
        bound = check_float("threshold", threshold, low=0)
        return [name for name, score in scores.items() if score > bound]

    def select_layers_by_disable_level(self, disable_level: int) -> list[str]:
        """Return the layers of the hardest groups; layers of one score, such as q/k/v, are one."""
        scores = self.scores
        count = check_int("disable_level", disable_level, low=0)
        levels = sorted(set(scores.values()), reverse=True)[:count]
        return [name for name, score in scores.items() if score in levels]


def _named(
    model: nn.Module, names: list[str], linears: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the linear layers of these names or patterns."""
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    found = match_all("layer_names", names, [*linears, *convolutions])
    chosen = {name for hits in found.values() for name in hits}
    return {name: module for name, module in linears.items() if name in chosen}

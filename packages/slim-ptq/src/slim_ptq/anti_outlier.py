"""``AntiOutlier``: outlier suppression of the classic interface, before ``Calibrator``.

Links between norms and linear layers, and between linear layers, are found from the data flow of
one sample, in any decoder, and proved; then scales move the outlier channels of activations into
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from slim_core.errors import CalibrationError, InvalidValueError, StructureError
from slim_core.groups import is_expert
from slim_core.logging import get_logger
from slim_core.matching import match_all
from slim_core.plan import dynamic_variant
from slim_core.scheme import QuantScheme
from slim_core.validate import check_type, did_you_mean
from slim_ptq.anti_outlier_config import AntiOutlierConfig
from slim_ptq.calibration.samples import check_samples
from slim_ptq.offload import place
from slim_ptq.pipeline.suppressing import AntiOutlierResult, suppress_model
from slim_ptq.structure import find_blocks, find_linears, fused_state_dict
from slim_ptq.structure.norms import is_norm_like
from slim_ptq.transforms import SkippedLink, added_biases, smoothed_norms

__all__ = ["AntiOutlier", "AntiOutlierConfig", "AntiOutlierResult", "SkippedLink", "smoothed_norms"]

_log = get_logger("ptq.anti_outlier")


class AntiOutlier:
    """Suppresses activation outliers of a model in place; its outputs stay what they are.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model in floating point.
    calib_data : list of list or dict
        Samples, called as ``model(*sample)`` or ``model(**sample)``.
    cfg : AntiOutlierConfig, optional
    norm_class_name : str, optional
        Only norms of this class are scaled; all norms if not given.

    Attributes
    ----------
    result : AntiOutlierResult or None
        What was scaled and what was skipped, after :meth:`process`.

    Raises
    ------
    InvalidTypeError, InvalidValueError, PatternError, CalibrationError, StructureError
        Before any work.
    """

    def __init__(
        self,
        model: nn.Module,
        calib_data: list[Any] | None = None,
        cfg: AntiOutlierConfig | None = None,
        norm_class_name: str | None = None,
    ) -> None:
        self.model = check_type("model", model, nn.Module)
        cfg = AntiOutlierConfig() if cfg is None else cfg
        self.cfg = check_type("cfg", cfg, AntiOutlierConfig)
        samples = check_samples("calib_data", calib_data)
        if not samples:
            raise CalibrationError("calib_data is empty, and outlier suppression needs samples")
        self._samples = samples
        find_blocks(model)  # refuses a model without decoder blocks
        self._barred = dict(_other_norms(model, norm_class_name))
        names = [*find_linears(model), *_convolutions(model)]
        disabled = match_all("disable_anti_names", cfg.disable_anti_names, names)
        for name in (name for hits in disabled.values() for name in hits):
            self._barred[name] = f"{name} is in disable_anti_names"
        self.result: AntiOutlierResult | None = None

    def process(self) -> None:
        """Find the links, measure their activations on all samples, and move the scales.

        Raises
        ------
        NumericalError
            A weight or an activation has NaN or infinity; names the layer.
        InvalidValueError
            The model was processed already.
        """
        if self.result is not None:
            raise InvalidValueError("the model was processed already")
        training = self.model.training
        self.model.eval()
        place(self.model, self.cfg.device)
        try:
            self.result = suppress_model(
                self.model, self._samples, self.cfg.method(), self._scheme_of, self._barred
            )
        finally:
            self.model.train(training)
        for item in self.result.skipped:
            _log.warning("%s is not smoothed: %s", item.source, item.reason)
        for link in self.result.scaled:
            if link.unshifted:
                _log.warning("%s is not shifted: %s", link.source, link.unshifted)
        _log.info("%d links smoothed with %s", len(self.result.scaled), self.cfg.anti_method)

    def save_model(self, path: str) -> None:
        """Save the float model, outliers suppressed, with ``save_pretrained``.

        Raises
        ------
        StructureError
            A norm or a layer was given a bias that the class of the model does not have.
        """
        added = added_biases(self.model)
        if added:
            raise StructureError(
                f"{type(self.model).__name__} has no bias in {added[0]} and would be read back "
                "without it",
                hint="quantize and save with Calibrator, or suppress outliers without shift",
            )
        state = fused_state_dict(self.model)  # experts as the model class expects them
        self.model.save_pretrained(path, state_dict=state)  # type: ignore[operator]

    def _scheme_of(self, name: str) -> QuantScheme:
        """Return how a layer will be quantized: experts per token, as ``Calibrator`` does."""
        scheme = self.cfg.scheme()
        return dynamic_variant(scheme) if is_expert(name) else scheme


def _convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _other_norms(model: nn.Module, wanted: str | None) -> Iterator[tuple[str, str]]:
    """Yield the norms that are not of the wanted class, with that as the reason."""
    if wanted is None:
        return
    check_type("norm_class_name", wanted, str)
    classes = sorted({type(module).__name__ for module in model.modules()})
    if wanted not in classes:
        norms = [item for item in classes if "norm" in item.lower()]
        raise InvalidValueError(
            f"norm_class_name: the model has no module of class {wanted!r}",
            hint=did_you_mean(wanted, classes) or f"its norm classes are {', '.join(norms)}",
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind != wanted and is_norm_like(module):
            yield name, f"it is a {kind}, and norm_class_name is {wanted}"

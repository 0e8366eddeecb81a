"""``AntiOutlier``: outlier suppression of the classic interface, before ``Calibrator``.

Links between norms and the linear layers behind them are found from the data flow of one sample,
in any decoder, and proved; then scales move the outlier channels of activations into weights.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slim_core.errors import CalibrationError, InvalidValueError, NumericalError
from slim_core.logging import get_logger
from slim_core.matching import match_all
from slim_core.numerics import check_finite
from slim_core.progress import track
from slim_core.validate import check_type, did_you_mean
from slim_ptq.anti_outlier_config import AntiOutlierConfig
from slim_ptq.calibration.samples import check_samples, feed
from slim_ptq.structure import (
    BlockTrace,
    Link,
    LinkKind,
    find_blocks,
    find_linears,
    fused_state_dict,
    trace_block,
    unfuse_experts,
    weight_of,
)
from slim_ptq.transforms import LinkStatistics, SuppressedLink, smoothed_norms, suppress_block

__all__ = ["AntiOutlier", "AntiOutlierConfig", "AntiOutlierResult", "SkippedLink", "smoothed_norms"]

_log = get_logger("ptq.anti_outlier")


@dataclass(frozen=True)
class SkippedLink:
    """A link that was left alone, and why; names are those of the model."""

    source: str
    targets: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class AntiOutlierResult:
    """What :meth:`AntiOutlier.process` did; names are those of the model."""

    scaled: tuple[SuppressedLink, ...] = field(default=(), repr=False)
    skipped: tuple[SkippedLink, ...] = ()


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
        self._norm_class = _check_norm_class(model, norm_class_name)
        self._blocks = find_blocks(model)
        names = [*find_linears(model), *_convolutions(model)]
        disabled = match_all("disable_anti_names", cfg.disable_anti_names, names)
        self._disabled = {name for names in disabled.values() for name in names}
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
        self.model.eval().to(self.cfg.device)
        try:
            self.result = self._process()
        finally:
            self.model.train(training)
        for item in self.result.skipped:
            _log.warning("%s is not smoothed: %s", item.source, item.reason)
        _log.info("%d links smoothed with %s", len(self.result.scaled), self.cfg.anti_method)

    def _process(self) -> AntiOutlierResult:
        unfuse_experts(self.model)
        method = self.cfg.method()
        scaled: list[SuppressedLink] = []
        skipped: list[SkippedLink] = []
        with contextlib.ExitStack() as stack, torch.no_grad():
            chosen: dict[str, tuple[tuple[Link, ...], LinkStatistics]] = {}
            for name, trace in self._traces():
                links = tuple(self._choose(name, trace, skipped))
                block = self.model.get_submodule(name)
                statistics = LinkStatistics(block, links, tokens=method.tokens, prefix=name)
                chosen[name] = links, stack.enter_context(statistics)
            for _ in feed(self.model, self._samples, "Measuring activations"):
                pass
            stack.close()
            for name in track(self._blocks, "Suppressing outliers"):
                links, statistics = chosen[name]
                block = self.model.get_submodule(name)
                done = suppress_block(block, links, statistics, method, prefix=name)
                scaled.extend(_full(name, link) for link in done)
        return AntiOutlierResult(tuple(scaled), tuple(skipped))

    def save_model(self, path: str) -> None:
        """Save the float model, outliers suppressed, with ``save_pretrained``."""
        state = fused_state_dict(self.model)  # experts as the model class expects them
        self.model.save_pretrained(path, state_dict=state)  # type: ignore[operator]

    def _traces(self) -> Iterator[tuple[str, BlockTrace]]:
        """Yield the trace of each block on what the shortest sample gives it."""
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def catch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.setdefault(name, (args, kwargs))

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(catch(name), with_kwargs=True)
            for name in self._blocks
        ]
        try:
            shortest = min(self._samples, key=_size)
            for _ in feed(self.model, [shortest], "Running one sample"):
                pass
        finally:
            for handle in handles:
                handle.remove()
        for name in track(self._blocks, "Proving links"):
            block = self.model.get_submodule(name)
            for local, linear in find_linears(block).items():  # attention kernels may hide NaN
                check_finite(f"{name}.{local}", "weight", weight_of(linear))
            try:
                yield name, trace_block(block, *calls.pop(name))
            except NumericalError as error:
                raise NumericalError(f"{name}: {error.message}", hint=error.hint) from error

    def _choose(self, block: str, trace: BlockTrace, skipped: list[SkippedLink]) -> Iterator[Link]:
        """Yield the links to scale and note the others."""
        for item in trace.rejected:
            if item.link.kind is LinkKind.NORM_LINEAR:
                skipped.append(_skip(block, item.link, item.reason))
        shared = _shared_parameters(self.model)
        for link in trace.links:
            if link.kind is not LinkKind.NORM_LINEAR:
                continue
            source = self.model.get_submodule(f"{block}.{link.source}")
            if self._norm_class and type(source).__name__ != self._norm_class:
                continue
            disabled = [n for n in link.target_names if f"{block}.{n}" in self._disabled]
            tied = [n for n in (link.source, *link.target_names) if f"{block}.{n}" in shared]
            if disabled:
                skipped.append(_skip(block, link, f"{disabled[0]} is in disable_anti_names"))
            elif tied:
                skipped.append(_skip(block, link, f"another module shares the weight of {tied[0]}"))
            else:
                yield link


def _size(sample: list[Any] | dict[str, Any]) -> int:
    items = sample.values() if isinstance(sample, dict) else sample
    return sum(item.numel() for item in items if isinstance(item, torch.Tensor))


def _skip(block: str, link: Link, reason: str) -> SkippedLink:
    return SkippedLink(
        f"{block}.{link.source}", tuple(f"{block}.{name}" for name in link.target_names), reason
    )


def _full(block: str, link: SuppressedLink) -> SuppressedLink:
    targets = tuple(f"{block}.{name}" for name in link.targets)
    return SuppressedLink(link.kind, f"{block}.{link.source}", targets, link.scales)


def _shared_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of modules with a parameter that another module holds too."""
    holders = [
        (name, id(parameter))
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    ]
    counts = Counter(identity for _, identity in holders)
    return frozenset(name for name, identity in holders if counts[identity] > 1)


def _convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _check_norm_class(model: nn.Module, name: str | None) -> str | None:
    if name is None:
        return None
    check_type("norm_class_name", name, str)
    classes = sorted({type(module).__name__ for module in model.modules()})
    if name not in classes:
        norms = [item for item in classes if "norm" in item.lower()]
        raise InvalidValueError(
            f"norm_class_name: the model has no module of class {name!r}",
            hint=did_you_mean(name, classes) or f"its norm classes are {', '.join(norms)}",
        )
    return name

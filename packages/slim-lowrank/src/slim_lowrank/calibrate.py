"""Collect the statistics of layers while a model runs over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import CalibrationError, InvalidTypeError, InvalidValueError
from slim_core.progress import track
from slim_lowrank.layers import find_layers
from slim_lowrank.solve import Statistics
from slim_lowrank.watch import Watch

Loss = Callable[[Any, Any], Tensor]


def collect(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    loss: Loss | None = None,
    forward: Callable[[Any], Any] | None = None,
    halves: bool = False,
) -> dict[str, Statistics]:
    """Run the model over batches and return the statistics of the named layers.

    Layers that read the same tensor (q/k/v, gate/up) share one second moment.  The model runs in
    eval mode; its training flags and gradients are as before afterwards.

    Parameters
    ----------
    model : Module
        On any device.
    names : iterable of str
        Layers that :func:`slim_lowrank.layers.find_layers` finds and does not skip.
    batches : iterable
        Dicts of keyword arguments, lists or tuples of positional ones, or single tensors.  With
        an ``attention_mask (batch, length)`` in a dict, masked positions do not count.
    max_batches : int, optional
        Stop after so many.
    loss : callable, optional
        ``loss(output, batch)`` gives the scalar loss; with it, gradients are collected.
    forward : callable, optional
        Runs one batch in place of calling the model.
    halves : bool
        Keep the second moments of the first half of the batches, too.

    Raises
    ------
    CalibrationError
        No batches, or a layer is never reached.
    InvalidTypeError
        A batch is none of the above.
    NumericalError
        A layer saw NaN or infinity.
    """
    data = read_batches(batches, max_batches)
    layers = find_layers(model)
    watches = [Watch(layers[name], gradients=loss is not None, halves=halves) for name in names]
    run = forward or (lambda batch: run_batch(model, batch))
    with evaluating(model), watching(watches):
        with torch.no_grad():
            run(data[0])
        share_inputs(watches)
        for index, batch in enumerate(track(data, "calibrating")):
            early = min(max(len(data) / 2 - index, 0.0), 1.0)
            _step(run, batch, watches, loss, early)
    return {watch.layer.name: watch.statistics() for watch in watches}


def read_batches(batches: Iterable[Any], max_batches: int | None = None) -> list[Any]:
    """Return the batches as a list, each checked to be something a model can be called with."""
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise InvalidTypeError(
            f"calibration data must be an iterable of batches, not {type(batches).__name__}"
        )
    data = list(islice(batches, max_batches))
    if not data:
        raise CalibrationError("the calibration data holds no batches")
    for index, batch in enumerate(data):
        if not isinstance(batch, (Mapping, list, tuple, Tensor)):
            raise InvalidTypeError(
                f"batch {index} must be a dict, list, tuple or tensor, not {type(batch).__name__}"
            )
    return data


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: dicts by keyword, lists and tuples by position."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(*batch)
    return model(batch)


def output_loss(output: Any, batch: Any) -> Any:
    """Return ``output.loss``, as models of transformers give it for batches with ``labels``.

    Raises
    ------
    InvalidValueError
        The output has no loss.
    """
    loss = getattr(output, "loss", None)
    if loss is None:
        raise InvalidValueError(
            "the output of the model has no loss", hint="put 'labels' into every batch"
        )
    return loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode with parameters that take no gradients; restore both afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def watching(watches: Sequence[Watch]) -> Iterator[None]:
    """Attach the watches, and detach them whatever happens."""
    try:
        for watch in watches:
            watch.attach()
        yield
    finally:
        for watch in watches:
            watch.detach()


def share_inputs(watches: Sequence[Watch]) -> None:
    """After a trial pass: let layers that read the same tensors keep one moment together."""
    leaders: dict[tuple[int, ...], Watch] = {}
    for watch in watches:
        key = tuple(id(tensor) for tensor in watch.trial)
        if key and watch.reads_features:
            watch.leader = leaders.setdefault(key, watch)
    for watch in watches:
        watch.start()


def token_mask(batch: Any) -> Tensor | None:
    """Return the boolean ``(batch, length)`` mask of real tokens, or None if all are."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def _step(
    run: Callable[[Any], Any],
    batch: Any,
    watches: Sequence[Watch],
    loss: Loss | None,
    early: float,
) -> None:
    mask = token_mask(batch)
    for watch in watches:
        watch.begin(mask, early)
    if loss is None:
        with torch.no_grad():
            run(batch)
        return
    with torch.enable_grad():
        value = loss(run(batch), batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InvalidValueError("loss must return a scalar tensor")
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]

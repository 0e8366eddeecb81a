"""Moving scales and shifts over links: function-preserving edits of the weights of one block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from slim_core.errors import InvalidValueError, NumericalError
from slim_ptq.structure import Link, LinkKind, NormForm, is_linear, weight_of
from slim_ptq.structure.linears import is_conv1d
from slim_ptq.transforms.biases import add_bias


class Edit(NamedTuple):
    """A parameter of a module and what it shall become; added where the module has none."""

    module: str
    parameter: str
    value: torch.Tensor


def scale_link(
    block: nn.Module,
    link: Link,
    scales: torch.Tensor,
    shift: torch.Tensor | None = None,
    *,
    stored: torch.dtype | None = None,
) -> torch.Tensor:
    """Divide the channels of a link's source by ``scales`` and multiply its readers' columns.

    Everything is computed in float32 (float64 for such weights) and rounded once to the dtype of
    each parameter.  A norm's new weight and bias are rounded first, and the readers get the scale
    and the shift that these make, so that in half precision only their own rounding remains.

    Parameters
    ----------
    block : nn.Module
        The block that the link was traced in; changed in place.
    link : Link
        A proved link.
    scales : torch.Tensor
        ``[link.width]``, positive, one for channels outside ``link.channels``.
    shift : torch.Tensor, optional
        ``[link.width]``, taken off the output of a norm before it is divided.  The norm and its
        readers get a bias if they have none.
    stored : torch.dtype, optional
        To which a norm's new parameters are rounded, because they will be stored in it; their own
        dtype if not given.

    Returns
    -------
    torch.Tensor
        The scales that took effect, ``[link.width]``, float32 or float64.

    Raises
    ------
    InvalidValueError
        ``scales`` or ``shift`` has another shape, is not finite (and positive), touches other
        channels, or the link cannot carry a shift.
    NumericalError
        A parameter becomes too large for its dtype; nothing is changed then.
    """
    _check(link, scales)
    if shift is not None:
        _check_shift(block, link, shift)
    with torch.no_grad():
        edits, effective, taken = _source_edits(block, link, scales, shift, stored)
        for target in link.targets:
            parameter = block.get_submodule(target.name).get_parameter(target.parameter)
            factor = effective[target.index.to(effective.device)].to(parameter.device)
            columns = factor if target.axis == 1 else factor[:, None]
            edits.append(Edit(target.name, target.parameter, _work(parameter) * columns))
            if taken is not None:
                edits.append(_reader_bias(block, target.name, taken))
        _write(block, link, edits)
    return effective


@contextlib.contextmanager
def scaled(block: nn.Module, link: Link, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """Apply :func:`scale_link` and put back the very same weights at the end."""
    names = [link.source, *link.target_names]
    saved = [
        (parameter, parameter.detach().clone())
        for name in dict.fromkeys(names)
        for parameter in block.get_submodule(name).parameters(recurse=False)
    ]
    try:
        yield scale_link(block, link, scales)
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def why_not_shifted(block: nn.Module, link: Link) -> str | None:
    """Say why a shift cannot be moved over a link at all, or None."""
    if link.kind is not LinkKind.NORM_LINEAR:
        return "only norms are shifted"
    if not link.direct:
        return "a reader does not read the output of the norm itself"
    others = [n for n in link.target_names if not is_linear(block.get_submodule(n))]
    return f"{others[0]} is no linear layer" if others else None


def _check(link: Link, scales: torch.Tensor) -> None:
    if scales.shape != (link.width,):
        raise InvalidValueError(
            f"scales for the link from {link.source} must have shape ({link.width},), "
            f"not {tuple(scales.shape)}"
        )
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise InvalidValueError(f"scales for {link.source} must be positive and finite")
    outside = torch.ones(link.width, dtype=torch.bool)
    outside[link.channels.cpu()] = False
    if bool((scales.detach().cpu()[outside] != 1).any()):
        raise InvalidValueError(f"scales for {link.source} touch channels that are not linked")


def _check_shift(block: nn.Module, link: Link, shift: torch.Tensor) -> None:
    reason = why_not_shifted(block, link)
    if reason is not None:
        raise InvalidValueError(f"the link from {link.source} carries no shift: {reason}")
    if shift.shape != (link.width,) or not bool(torch.isfinite(shift).all()):
        raise InvalidValueError(
            f"the shift for {link.source} must be finite and have shape ({link.width},), "
            f"not {tuple(shift.shape)}"
        )


def _work(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    return value if value.dtype == torch.float64 else value.float()


def _source_edits(
    block: nn.Module,
    link: Link,
    scales: torch.Tensor,
    shift: torch.Tensor | None,
    stored: torch.dtype | None,
) -> tuple[list[Edit], torch.Tensor, torch.Tensor | None]:
    """Return the new parameters of the source, and the scales and the shift they stand for."""
    source = block.get_submodule(link.source)
    weight = source.get_parameter("weight")
    bias = getattr(source, "bias", None)
    values = _work(weight)
    kind = stored or weight.dtype
    scales = scales.to(values.device, values.dtype)
    if link.norm_form is not None:
        one = 1.0 if link.norm_form is NormForm.ONE_PLUS else 0.0
        new = ((values + one) / scales - one).to(kind)
        kept = new.to(values.dtype) + one
        scales = torch.where(kept * values.add(one) > 0, values.add(one) / kept, scales)
    else:
        new = values / (scales if is_conv1d(source) else scales[:, None])
    edits = [Edit(link.source, "weight", new)]
    if shift is None:
        if bias is not None:
            edits.append(Edit(link.source, "bias", _work(bias) / scales))
        return edits, scales, None
    old = torch.zeros_like(scales) if bias is None else _work(bias)
    moved = ((old - shift.to(scales)) / scales).to(kind)
    edits.append(Edit(link.source, "bias", moved))
    return edits, scales, old - moved.to(scales) * scales


def _reader_bias(block: nn.Module, name: str, taken: torch.Tensor) -> Edit:
    """Return the bias of a reader that makes up for what was taken off its input."""
    linear = block.get_submodule(name)
    weight = _work(weight_of(linear))
    back = weight @ taken.to(weight)
    bias = getattr(linear, "bias", None)
    return Edit(name, "bias", back if bias is None else _work(bias) + back)


def _write(block: nn.Module, link: Link, edits: list[Edit]) -> None:
    """Change or add the parameters, once all of them are known to be finite."""
    ready = []
    for name, parameter, value in edits:
        module = block.get_submodule(name)
        old = getattr(module, parameter, None)
        rounded = value.to((module.get_parameter("weight") if old is None else old).dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise NumericalError(
                f"smoothing {link.source} makes the {parameter} of {name} infinite "
                f"in {rounded.dtype}"
            )
        ready.append((module, old, rounded))
    for module, old, value in ready:
        if old is None:
            add_bias(module, value)
        else:
            old.data.copy_(value)

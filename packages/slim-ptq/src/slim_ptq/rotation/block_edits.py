"""What a rotation of the residual stream does to the parameters of one decoder block.

After QuaRot (arXiv:2404.00456), offline only: with ``x' = x Q`` in the place of the residual ``x``,
a norm loses its weight to its readers (``W' = W diag(w) Q``), and what is added to the residual is
rotated (``W' = Qᵀ W``).  The channels of every value head are rotated among themselves, which the
output projection undoes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from slim_core.errors import StructureError
from slim_ptq.orthogonal import Orthogonal
from slim_ptq.structure import BlockTrace, Link, LinkKind, NormForm, find_linears, weight_of
from slim_ptq.structure.linears import is_conv1d

Read = Callable[[str], torch.Tensor]
"""Gives the value of a parameter of the block by its local name."""

Step = Callable[[torch.Tensor, Read], torch.Tensor]


class BlockEdits:
    """Steps by the local name of the parameter that they change.

    Parameters
    ----------
    block : nn.Module
        Of which only the kinds of modules and the shapes are looked at.
    trace : BlockTrace
        Of this block or of one like it.
    residual : Orthogonal
        Rotation of the residual stream.
    head : Orthogonal, optional
        Rotation of the channels of a value head.

    Raises
    ------
    StructureError
        Nothing in the block reads the residual stream through a norm.
    """

    def __init__(
        self,
        block: nn.Module,
        trace: BlockTrace,
        residual: Orthogonal,
        head: Orthogonal | None = None,
    ) -> None:
        self._block = block
        self._residual = residual
        self._steps: dict[str, list[Step]] = defaultdict(list)
        norms = [link for link in trace.links if _reads_residual(link, residual.size)]
        if not norms:
            raise StructureError("no layer of it reads the residual stream through a norm")
        for link in norms:
            self._fold_norm(link)
        readers = {name for link in norms for name in link.target_names}
        for name, linear in find_linears(block).items():
            if name not in readers and weight_of(linear).shape[0] == residual.size:
                self._rotate_writer(name, linear)
        for link in trace.links:
            if head is not None and link.kind is LinkKind.V_O:
                self._rotate_heads(link, head)

    @property
    def names(self) -> tuple[str, ...]:
        """Local names of the parameters that change."""
        return tuple(self._steps)

    def value(self, name: str, read: Read) -> torch.Tensor:
        """Return what a parameter becomes, float32."""
        value = read(name).double()
        for step in self._steps[name]:
            value = step(value, read)
        return value.float()

    def _fold_norm(self, link: Link) -> None:
        norm = f"{link.source}.weight"
        one = 1.0 if link.norm_form is NormForm.ONE_PLUS else 0.0
        self._steps[norm].append(lambda weight, _read: torch.full_like(weight, 1.0 - one))
        for target in link.targets:

            def step(weight: torch.Tensor, read: Read, axis: int = target.axis) -> torch.Tensor:
                scale = read(norm).double() + one
                if axis == 1:
                    return self._residual.right(weight * scale)
                return self._residual.left(weight * scale[:, None])

            self._steps[f"{target.name}.{target.parameter}"].append(step)

    def _rotate_writer(self, name: str, linear: nn.Module) -> None:
        rotate = self._residual.right if is_conv1d(linear) else self._residual.left
        self._steps[f"{name}.weight"].append(lambda weight, _read: rotate(weight))
        if getattr(linear, "bias", None) is not None:
            right = self._residual.right
            self._steps[f"{name}.bias"].append(lambda bias, _read: right(bias))

    def _rotate_heads(self, link: Link, head: Orthogonal) -> None:
        """Rotate the rows of each value head, and the columns that read them."""
        channels = link.channels
        if len(channels) % head.size or any(
            not _in_heads(target.index, head.size) for target in link.targets
        ):
            return
        source = self._block.get_submodule(link.source)
        transposed = is_conv1d(source)

        def rows(weight: torch.Tensor, _read: Read) -> torch.Tensor:
            table = weight.T if transposed else weight
            heads = table[channels].reshape(-1, head.size, *table.shape[1:])
            moved = head.right(heads.movedim(1, -1)).movedim(-1, 1)
            table = table.clone()
            table[channels] = moved.reshape(len(channels), *table.shape[1:])
            return table.T if transposed else table

        self._steps[f"{link.source}.weight"].append(rows)
        if getattr(source, "bias", None) is not None:

            def biases(bias: torch.Tensor, _read: Read) -> torch.Tensor:
                bias = bias.clone()
                bias[channels] = head.right(bias[channels].reshape(-1, head.size)).reshape(-1)
                return bias

            self._steps[f"{link.source}.bias"].append(biases)
        for target in link.targets:

            def columns(weight: torch.Tensor, _read: Read, axis: int = target.axis) -> torch.Tensor:
                table = weight if axis == 1 else weight.T
                turned = head.right(table.reshape(len(table), -1, head.size)).reshape(table.shape)
                return turned if axis == 1 else turned.T

            self._steps[f"{target.name}.{target.parameter}"].append(columns)


def _reads_residual(link: Link, size: int) -> bool:
    return link.kind is LinkKind.NORM_LINEAR and link.width == size


def _in_heads(index: torch.Tensor, size: int) -> bool:
    """Whether every head of the input channels carries one head of the producer, in its order."""
    if len(index) % size:
        return False
    heads = index.reshape(-1, size)
    steps = heads - heads[:, :1]
    return bool((steps == torch.arange(size, device=index.device)).all())

"""Collecting the statistics of the links of a block while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from slim_core.numerics import check_finite
from slim_ptq.structure import Link, LinkKind
from slim_ptq.transforms.statistics import ChannelStats


class LinkStatistics:
    """Context in which every forward pass of a block adds to the statistics of its links.

    Parameters
    ----------
    block : nn.Module
        Block in floating point.
    links : sequence of Link
        Links of the block.
    tokens : int
        How many tokens to keep for each link.
    prefix : str
        Name of the block, for messages.

    Attributes
    ----------
    of : dict of str to ChannelStats
        What the readers of each link read, by the local name of the link's source.
    """

    def __init__(
        self, block: nn.Module, links: Sequence[Link], *, tokens: int = 0, prefix: str = ""
    ) -> None:
        self.of: dict[str, ChannelStats] = {link.source: ChannelStats(tokens) for link in links}
        self._block, self._links, self._prefix = block, tuple(links), prefix
        self._handles: list[Any] = []

    def __enter__(self) -> LinkStatistics:
        for link in self._links:
            if link.kind is LinkKind.NORM_LINEAR:
                source = self._block.get_submodule(link.source)
                self._handles.append(source.register_forward_hook(self._after(link)))
            else:
                reader = self._block.get_submodule(link.target_names[0])
                self._handles.append(reader.register_forward_pre_hook(self._before(link)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _after(self, link: Link) -> Any:
        what = f"{self._prefix}.{link.source}".lstrip(".")

        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            check_finite(what, "output", out)
            self.of[link.source].update(out)

        return hook

    def _before(self, link: Link) -> Any:
        what = f"{self._prefix}.{link.target_names[0]}".lstrip(".")

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            check_finite(what, "input", args[0])
            self.of[link.source].update(args[0])

        return hook

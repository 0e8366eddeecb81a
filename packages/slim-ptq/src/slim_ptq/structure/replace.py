"""Other layers in the place of those of a block, for the time being."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn


@contextlib.contextmanager
def replaced(block: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put layers, by their local names, in the place of those of a block for the time being."""
    own = {local: block.get_submodule(local) for local in layers}

    def put(modules: Mapping[str, nn.Module]) -> None:
        for local, module in modules.items():
            parent, _, leaf = local.rpartition(".")
            setattr(block.get_submodule(parent), leaf, module)

    try:
        put(layers)
        yield
    finally:
        put(own)

"""Caches and attention within the blockwise pipeline: measured on float blocks, then written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slim_core.attention_types import AFTER_ROTARY
from slim_core.errors import StructureError
from slim_core.export import CheckpointExport
from slim_core.matching import match_all
from slim_core.recipe import Recipe
from slim_ptq.attention import (
    attention_modules,
    check_called,
    install_quantizers,
    reachable_attention,
)
from slim_ptq.attention.hooking import unhook
from slim_ptq.attention.names import Named, cache_tensors, head_params, saved_module_name
from slim_ptq.attention.ranking import hardest
from slim_ptq.inventory import Inventory
from slim_ptq.kv import (
    CacheQuantizer,
    CacheRanges,
    cache_scheme,
    find_cache_sources,
    only_attention,
)
from slim_ptq.pipeline.blocks import BlockRunner
from slim_ptq.structure import find_linears
from slim_ptq.tensors import to_numpy


@dataclass(frozen=True)
class MeasuredHeads:
    """What is kept of an attention: its difficulty, and scales (heads, 1) of q, k and v."""

    difficulty: float
    scales: dict[str, torch.Tensor]


class BlockAttention:
    """What a recipe asks for beyond linear layers.

    Parameters
    ----------
    recipe : Recipe
        ``kv_cache`` or ``attention``, or neither.
    inventory : Inventory
    export : CheckpointExport
        Caches are written with their block, attention at the end, when the ranking is known.
    """

    def __init__(self, recipe: Recipe, inventory: Inventory, export: CheckpointExport) -> None:
        self._recipe = recipe
        self._inventory = inventory
        self._export = export
        self._heads: dict[str, MeasuredHeads] = {}
        self._caches = 0
        self._names = attention_of(recipe, inventory)

    @contextmanager
    def watching(self, runner: BlockRunner, block: nn.Module, index: int) -> Iterator[None]:
        """Measure a block while the context is open, during which it runs on all batches.

        Raises
        ------
        StructureError
            Its keys and values, or its attention, cannot be reached.
        """
        path = self._inventory.blocks[index]
        if not attention_modules(block, [""]):  # a recurrent block of a hybrid model
            yield
        elif self._recipe.kv_cache is not None:
            args, kwargs = runner.example(index)
            sources = find_cache_sources(
                block, find_linears(block), lambda: block(*args, **kwargs), f"{path}."
            )
            rotated = only_attention(block, path) if self._recipe.kv_cache.after_rotary else None
            ranges = CacheRanges(sources, rotated)
            with ranges.watching(block):
                yield
            self._write_caches(path, runner.team.merged(ranges))
        elif self._recipe.attention is not None:
            yield from self._measure_heads(runner, block, index, path)
        else:
            yield

    def finish(self) -> None:
        """Write what could not be written with its block.

        Raises
        ------
        StructureError
            There was nothing to quantize.
        """
        if self._recipe.kv_cache is not None and not self._caches:
            raise StructureError("the model has no attention, so there is no cache to quantize")
        if self._recipe.kv_cache is not None and self._recipe.kv_cache.after_rotary:
            self._export.note(AFTER_ROTARY, True)
        if self._recipe.attention is None:
            return
        left_out = hardest(self._heads, self._recipe.attention.fallback)
        for name, heads in self._heads.items():
            if name not in left_out:
                for part, scale in heads.scales.items():
                    self._write(head_params(name, part, scale))

    def save_state(self) -> dict[str, Any]:
        """Return JSON values for :meth:`load_state`."""
        heads = {
            name: [item.difficulty, {part: s.tolist() for part, s in item.scales.items()}]
            for name, item in self._heads.items()
        }
        return {"caches": self._caches, "heads": heads}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on after the blocks of an interrupted run."""
        self._caches = state["caches"]
        self._heads = {
            name: MeasuredHeads(difficulty, {p: torch.tensor(s) for p, s in scales.items()})
            for name, (difficulty, scales) in state["heads"].items()
        }

    def _write_caches(self, path: str, ranges: CacheRanges) -> None:
        assert self._recipe.kv_cache is not None  # narrowing
        scheme = cache_scheme(symmetric=self._recipe.kv_cache.symmetric)
        for source in ranges.sources:
            weight = self._inventory.rename(f"{path}.{source.linear}.weight")
            name = weight.removesuffix(".weight")
            params = ranges.params(source, scheme, name)
            self._write(cache_tensors(name, CacheQuantizer(source.part, *params, source.channels)))
            self._caches += 1

    def _measure_heads(
        self, runner: BlockRunner, block: nn.Module, index: int, path: str
    ) -> Iterator[None]:
        inside = f"{path}."
        names = [n.removeprefix(inside) for n in self._names if n.startswith(inside)]
        found = install_quantizers(block, names)
        for quantizer in found.values():
            quantizer.observe()
        args, kwargs = runner.example(index)
        with torch.no_grad():  # what is not called is said before the long run
            block(*args, **kwargs)
        check_called(found, inside)
        for quantizer in found.values():
            quantizer.observe()
        yield
        for local, quantizer in found.items():
            seen = runner.team.merged(quantizer)
            scales = {part: scale.cpu() for part, (scale, _) in seen.params().items()}
            name = saved_module_name(block, local, self._renamer(path))
            self._heads[name] = MeasuredHeads(seen.difficulty, scales)
            if quantizer.hooked:
                unhook(block.get_submodule(local))

    def _renamer(self, path: str) -> Callable[[str], str]:
        return lambda local: self._inventory.rename(f"{path}.{local}")

    def _write(self, tensors: Iterator[Named]) -> None:
        for name, tensor, kind in tensors:
            self._export.add_float(name, to_numpy(tensor), kind)


def attention_of(recipe: Recipe, inventory: Inventory) -> list[str]:
    """Return the names of the attention modules that a recipe quantizes.

    Raises
    ------
    PatternError
        A pattern of ``attention.exclude`` matches no attention module.
    StructureError
        The queries, keys and values of a module cannot be reached.
    """
    if recipe.attention is None or inventory.model is None:
        return []
    names = list(attention_modules(inventory.model, inventory.blocks))
    hits = match_all("attention.exclude", recipe.attention.exclude, names)
    excluded = {name for found in hits.values() for name in found}
    return reachable_attention(inventory.model, inventory.blocks, excluded)

"""Experts that no token reached: what they would do is what their siblings did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from slim_ptq.structure.links import Link, Target


class Siblings:
    """Items of the module lists of a block that are built alike.

    Parameters
    ----------
    block : nn.Module
        The decoder block.
    """

    def __init__(self, block: nn.Module) -> None:
        self._stacks: dict[str, list[str]] = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) > 1 and _alike(module):
                self._stacks[name] = [f"{name}.{index}" for index in range(len(module))]

    def counterparts(self, name: str) -> tuple[tuple[str, str], ...]:
        """Return (sibling item, counterpart of ``name`` in it) for every other item."""
        for stack, items in self._stacks.items():
            if name.startswith(f"{stack}."):
                index, _, rest = name[len(stack) + 1 :].partition(".")
                own = f"{stack}.{index}"
                suffix = f".{rest}" if rest else ""
                return tuple((item, item + suffix) for item in items if item != own)
        return ()

    def known(self, name: str, run: Iterable[str]) -> bool:
        """Tell whether a counterpart of a module that was not run was run."""
        ran = set(run)
        return any(other in ran for _, other in self.counterparts(name))

    def mirror_groups(
        self, groups: Sequence[tuple[str, ...]], missing: Sequence[str]
    ) -> tuple[tuple[str, ...], ...]:
        """Group modules that were not run as their counterparts are grouped."""
        left, found = list(missing), []
        while left:
            group = self._mirrored(left[0], groups, left)
            found.append(group)
            left = [name for name in left if name not in group]
        return tuple(found)

    def _mirrored(
        self, name: str, groups: Sequence[tuple[str, ...]], missing: Sequence[str]
    ) -> tuple[str, ...]:
        own = {name: name}
        for _, other in self.counterparts(name):
            for group in groups:
                if other in group:
                    item = self._item(name)
                    own = {self._renamed(member, item): member for member in group}
                    return tuple(member for member in own if member in missing)
        return (name,)

    def complete(self, links: Sequence[Link]) -> list[Link]:
        """Add to the links what the experts that were not run would have added."""
        sources = {link.source for link in links}
        whole = [self._with_all_targets(link) for link in links]
        for link in links:
            item = self._item(link.source)
            if item is None:
                continue
            for other, source in self.counterparts(link.source):
                inside = all(target.name.startswith(f"{item}.") for target in link.targets)
                if inside and source not in sources:
                    sources.add(source)
                    targets = tuple(
                        replace(target, name=self._renamed(target.name, other))
                        for target in link.targets
                    )
                    whole.append(replace(link, source=source, targets=targets))
        return whole

    def _with_all_targets(self, link: Link) -> Link:
        """Add the counterparts of readers, unless source and reader are in one expert."""
        item = self._item(link.source)
        targets: dict[tuple[str, str], Target] = {(t.name, t.parameter): t for t in link.targets}
        for target in link.targets:
            if item is not None and target.name.startswith(f"{item}."):
                continue
            for _, name in self.counterparts(target.name):
                targets.setdefault((name, target.parameter), replace(target, name=name))
        return replace(link, targets=tuple(targets.values()))

    def _item(self, name: str) -> str | None:
        for stack in self._stacks:
            if name.startswith(f"{stack}."):
                return f"{stack}.{name[len(stack) + 1 :].partition('.')[0]}"
        return None

    def _renamed(self, name: str, item: str | None) -> str:
        """Return the counterpart of ``name`` in the list item ``item``."""
        own = self._item(name)
        return name if own is None or item is None else item + name[len(own) :]


def _alike(stack: nn.ModuleList) -> bool:
    kinds = [
        {name: tuple(parameter.shape) for name, parameter in item.named_parameters()}
        for item in stack
    ]
    return bool(kinds[0]) and all(kind == kinds[0] for kind in kinds)

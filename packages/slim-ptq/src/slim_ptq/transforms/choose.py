"""Which of the links of a block are scaled, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slim_ptq.structure import BlockTrace, Link, LinkKind


@dataclass(frozen=True)
class SkippedLink:
    """A link that was left alone, and why; names are local to the block or those of the model."""

    source: str
    targets: tuple[str, ...]
    reason: str

    def under(self, prefix: str) -> SkippedLink:
        """Return the same with the name of the block before each name."""
        targets = tuple(f"{prefix}.{name}" for name in self.targets)
        return SkippedLink(f"{prefix}.{self.source}", targets, self.reason)


def choose_links(
    trace: BlockTrace, kinds: frozenset[LinkKind], barred: Mapping[str, str]
) -> tuple[tuple[Link, ...], tuple[SkippedLink, ...]]:
    """Split the links of the wanted kinds into those to scale and those to leave alone.

    Parameters
    ----------
    trace : BlockTrace
    kinds : frozenset of LinkKind
    barred : mapping
        Local names of modules that no scaled link may have, each with the reason.
    """
    chosen: list[Link] = []
    skipped = [skip(x.link, x.reason) for x in trace.rejected if x.link.kind in kinds]
    for link in trace.links:
        if link.kind not in kinds:
            continue
        reasons = [barred[name] for name in (link.source, *link.target_names) if name in barred]
        if reasons:
            skipped.append(skip(link, reasons[0]))
        else:
            chosen.append(link)
    return tuple(chosen), tuple(skipped)


def skip(link: Link, reason: str) -> SkippedLink:
    """Return the entry of a link that is left alone."""
    return SkippedLink(link.source, link.target_names, reason)

"""What each head of each layer keeps while the model runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slim_core.errors import InvalidValueError
from slim_core.files import PathLike
from slim_core.validate import check_choice, check_int
from slim_ra.geometry import HeadGeometry, head_geometry
from slim_ra.profile import AlibiWindows, Profile, RetrievalHeads, check_fits, read_profile

COMPENSATIONS = ("mean", "none")
_EXACT_GROUPS = 16  # more distinct windows than this in a layer are rounded up to buckets


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that keep the same tokens.

    Attributes
    ----------
    heads : tuple of int
    full : bool
        They keep everything.
    window : int or None
        Latest tokens they keep; None for the rule of the policy.
    """

    heads: tuple[int, ...]
    full: bool = False
    window: int | None = None


@dataclass(frozen=True)
class RazorPolicy:
    """Which heads keep everything, and how much the others keep.

    A head that does not keep everything holds the first ``sink_size`` tokens, a window of the
    latest ones, and one compensation token that stands for all tokens it dropped.

    Attributes
    ----------
    profile : RetrievalHeads or AlibiWindows
    geometry : HeadGeometry
    sink_size : int
        First tokens that every head keeps.
    buffer_min, buffer_ratio : int
        The window of heads without one of their own is
        ``max(buffer_min, tokens // buffer_ratio)``, by the tokens there are when it is first cut.
    window : int or None
        Use this window instead.
    grow : bool
        Let the window follow the growing number of tokens.
    protect_first_layers : int
        So many first layers keep everything.
    compensation : {"mean", "none"}
        Whether dropped tokens leave a compensation token.
    """

    profile: Profile
    geometry: HeadGeometry
    sink_size: int = 4
    buffer_min: int = 4000
    buffer_ratio: int = 5
    window: int | None = None
    grow: bool = False
    protect_first_layers: int = 0
    compensation: str = "mean"

    def __post_init__(self) -> None:
        layers = self.geometry.layers
        check_int("sink_size", self.sink_size, low=0)
        check_int("buffer_min", self.buffer_min, low=1)
        check_int("buffer_ratio", self.buffer_ratio, low=1)
        check_int("protect_first_layers", self.protect_first_layers, low=0, high=layers)
        check_choice("compensation", self.compensation, COMPENSATIONS)
        if self.window is not None:
            check_int("window", self.window, low=1)
        if isinstance(self.profile, RetrievalHeads):
            check_fits(self.profile.union(), layers, self.geometry.kv_heads)
        else:
            self._check_windows(self.profile)

    @classmethod
    def from_profile(cls, profile: Profile, config: Any, **options: Any) -> RazorPolicy:
        """Make a policy for the model with this configuration.

        ``options`` are the attributes above.  For ALiBi windows ``sink_size`` is 0 and
        ``compensation`` "none" unless given, as in the deployed flows.
        """
        if isinstance(profile, AlibiWindows):
            options = {"sink_size": 0, "compensation": "none", **options}
        return cls(profile, head_geometry(config), **options)

    @classmethod
    def from_file(cls, path: PathLike, config: Any, **options: Any) -> RazorPolicy:
        """Read ``win.pt`` or another dialect, see :func:`slim_ra.profile.read_profile`."""
        return cls.from_profile(read_profile(path), config, **options)

    def window_for(self, tokens: int) -> int:
        """Window of a head without one of its own, after ``tokens`` tokens."""
        return self.window or max(self.buffer_min, tokens // self.buffer_ratio)

    def groups(self, layer: int) -> list[HeadGroup]:
        """Return the groups of a layer; every KV head is in exactly one."""
        everyone = tuple(range(self.geometry.kv_heads))
        if layer < self.protect_first_layers:
            return [HeadGroup(everyone, full=True)]
        if isinstance(self.profile, AlibiWindows):
            return self._window_groups(self._kv_windows(self.profile, layer))
        full = tuple(self.profile.union().get(layer, ()))
        rest = tuple(head for head in everyone if head not in full)
        groups = [HeadGroup(full, full=True), HeadGroup(rest)]
        return [group for group in groups if group.heads]

    def _kv_windows(self, profile: AlibiWindows, layer: int) -> list[int]:
        """Window of each KV head: what the widest of its query heads needs."""
        row = profile.windows if profile.windows.ndim == 1 else profile.windows[layer]
        windows: list[int] = row.view(self.geometry.kv_heads, -1).amax(1).tolist()
        return windows

    @staticmethod
    def _window_groups(windows: Sequence[int]) -> list[HeadGroup]:
        if len(set(windows)) > _EXACT_GROUPS:
            windows = [math.ceil(2 ** (math.ceil(2 * math.log2(w)) / 2)) for w in windows]
        heads_of: dict[int, list[int]] = {}
        for head, window in enumerate(windows):
            heads_of.setdefault(window, []).append(head)
        return [HeadGroup(tuple(heads), window=window) for window, heads in heads_of.items()]

    def _check_windows(self, profile: AlibiWindows) -> None:
        shape = tuple(profile.windows.shape)
        heads = self.geometry.heads
        if shape not in ((heads,), (self.geometry.layers, heads)):
            raise InvalidValueError(
                f"the profile has windows of shape {list(shape)}, but the model has "
                f"{self.geometry.layers} layers of {heads} heads"
            )
        smallest = int(profile.windows.min())
        if smallest < 1:
            raise InvalidValueError(
                f"windows must be at least 1 to run, not {smallest}",
                hint="search again with a larger alpha",
            )

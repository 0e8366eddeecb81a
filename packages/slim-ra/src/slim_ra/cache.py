"""RazorCache: a key/value cache that is physically as small as the policy says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from slim_core.errors import InvalidTypeError, InvalidValueError, StructureError
from slim_core.files import PathLike
from slim_core.validate import check_choice, check_type
from slim_ra.geometry import text_config
from slim_ra.layer import RazorLayer
from slim_ra.policy import RazorPolicy
from slim_ra.profile import AlibiWindows

MODES = ("prefill", "incremental")
_HINT = "use slim_ra.enable(model) first, and make the cache with model.config itself"

# Configurations of the models that are set up for this cache, by identity: they do not hash.
enabled: dict[int, Any] = {}


class RazorCache(Cache):
    """Cache for ``model.generate(..., cache=cache)`` after :func:`slim_ra.enable`.

    Before transformers 5.24 the argument is called ``past_key_values``.

    Attention over the first tokens is exact.  Then every head without full history keeps its
    sinks, a window and a compensation token.

    Parameters
    ----------
    config : PretrainedConfig
        ``model.config`` itself, not a copy.
    policy : RazorPolicy
    mode : {"incremental", "prefill"}
        "incremental": the window moves on with every new token, so heads without full history
        hold constant memory.  "prefill": cut once after the first tokens; later ones are kept.

    Raises
    ------
    StructureError
        During a forward pass, if the model was not enabled.
    """

    def __init__(self, config: Any, policy: RazorPolicy, *, mode: str = "incremental") -> None:
        if not hasattr(config, "get_text_config"):
            raise InvalidTypeError(
                f"config must be the configuration of a model, not {type(config).__name__}"
            )
        self.config = text_config(config)
        self.policy = check_type("policy", policy, RazorPolicy)
        self.mode = check_choice("mode", mode, MODES)
        if policy.grow and mode == "prefill":
            raise InvalidValueError("mode must be 'incremental' for a policy whose window grows")
        layers: list[Any] = list(DynamicCache(config=config).layers)
        frozen = mode == "prefill"
        for index, layer in enumerate(layers):
            # Sliding-window, linear and shared layers hold no long history; they stay as they are.
            if type(layer) is DynamicLayer:
                layers[index] = RazorLayer(index, policy, frozen=frozen, check=self._check)
        super().__init__(layers=layers)
        if not self.razor_layers:
            raise StructureError("the model has no layer with full attention to compress")

    @classmethod
    def from_file(
        cls, path: PathLike, config: Any, *, mode: str = "incremental", **options: Any
    ) -> RazorCache:
        """Make a cache for a ``win.pt``; ``options`` are those of :class:`RazorPolicy`."""
        return cls(config, RazorPolicy.from_file(path, config, **options), mode=mode)

    @property
    def razor_layers(self) -> list[RazorLayer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, RazorLayer)]

    def nbytes(self) -> int:
        """Bytes of all keys, values and compensation tokens held, in all layers."""
        return sum(_layer_bytes(layer)[0] for layer in self.layers)

    def allocated_nbytes(self) -> int:
        """Bytes of their storage, spare capacity for coming tokens included."""
        return sum(_layer_bytes(layer)[1] for layer in self.layers)

    def report(self) -> list[dict[str, Any]]:
        """Describe each compressed layer: bytes, and tokens held by each group of heads."""
        rows = []
        for layer in self.razor_layers:
            groups = [
                {
                    "heads": store.heads.tolist(),
                    "tokens": store.size,
                    "dropped": int(store.dropped.max()) if store.dropped.numel() else 0,
                    "nbytes": store.nbytes(),
                }
                for store in layer.stores
            ]
            used, allocated = _layer_bytes(layer)
            rows.append(
                {
                    "layer": layer.index,
                    "seen": layer.seen,
                    "nbytes": used,
                    "allocated_nbytes": allocated,
                    "groups": groups,
                }
            )
        return rows

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        """Keep everything exactly within the block, and cut at its end.

        For prompts that are fed in chunks: attention stays exact over all of them.
        """
        for layer in self.razor_layers:
            layer.defer = True
        try:
            yield
        finally:
            for layer in self.razor_layers:
                layer.defer = False
        for layer in self.razor_layers:
            layer.fold()

    def check_consumed(self) -> None:
        """Refuse to go on when a layer was given keys and values but never attended to them.

        Raises
        ------
        StructureError
            Naming the layer.
        """
        for layer in self.razor_layers:
            if layer.pending is not None:
                layer.pending = None
                raise StructureError(
                    f"layer {layer.index} did not attend through its RazorCache", hint=_HINT
                )

    def _check(self, index: int) -> None:
        """Raise unless the model will consume what is about to be stored."""
        if enabled.get(id(self.config)) is not self.config:
            raise StructureError("the model is not set up for RazorCache", hint=_HINT)
        self.check_consumed()
        current: Any = self.layers[index]
        if isinstance(self.policy.profile, AlibiWindows) and not current.alibi:
            raise StructureError("ALiBi windows are given, but this model has no ALiBi attention")


def _layer_bytes(layer: Any) -> tuple[int, int]:
    """Bytes used and allocated by a layer of any kind."""
    if isinstance(layer, RazorLayer):
        used = sum(store.nbytes() for store in layer.stores)
        return used, sum(store.allocated() for store in layer.stores)
    tensors = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    total = sum(t.numel() * t.element_size() for t in tensors if t.ndim > 1)
    return total, total

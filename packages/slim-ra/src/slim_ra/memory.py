"""Bytes of a cache, computed rather than measured."""

from __future__ import annotations

from dataclasses import dataclass

from slim_ra.policy import RazorPolicy
from slim_ra.profile import AlibiWindows


@dataclass(frozen=True)
class Memory:
    """Predicted bytes after a prompt.

    Attributes
    ----------
    tokens : int
    full, razor : int
        Bytes of the full and of the compressed cache.
    """

    tokens: int
    full: int
    razor: int

    @property
    def ratio(self) -> float:
        """Share of the full cache that is left."""
        return self.razor / self.full


def predict(
    policy: RazorPolicy, tokens: int, *, batch: int = 1, itemsize: int = 2, value_dim: int = 0
) -> Memory:
    """Predict what a RazorCache holds after a prompt of ``tokens`` tokens.

    A head without full history holds ``min(T, S + W)`` tokens (``S`` sinks, window ``W``) and, with
    compensation, two fp32 vectors (with ALiBi two for each query head that shares it); the other
    heads hold ``T``.  Exact for models whose layers all
    have full attention.

    Parameters
    ----------
    policy : RazorPolicy
    tokens, batch : int
    itemsize : int
        Bytes of one number, 2 for fp16 and bf16.
    value_dim : int
        Size of a value where it differs from that of a key.
    """
    geometry = policy.geometry
    width = geometry.head_dim + (value_dim or geometry.head_dim)
    slots = means = 0
    own_means = geometry.group if isinstance(policy.profile, AlibiWindows) else 1
    for layer in range(geometry.layers):
        for group in policy.groups(layer):
            held = tokens
            if not group.full:
                window = group.window or policy.window_for(tokens)
                held = min(tokens, window + policy.sink_size)
                means += own_means * len(group.heads) * (policy.compensation == "mean")
            slots += len(group.heads) * held
    full = batch * width * itemsize * geometry.layers * geometry.kv_heads * tokens
    return Memory(tokens, full, batch * width * (itemsize * slots + 4 * means))

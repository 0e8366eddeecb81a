"""Which output channels of which linear layers become the keys and the values of attention.

Found by differentiation instead of by names: the output of every linear layer is made a leaf, the
model runs once, and the channels on which the keys of an attention depend are the key channels.
This holds for separate and for fused projections in any order of channels (all queries first as in
ChatGLM, head by head as in GPT-NeoX and Bloom, group by group as in InternLM2), through norms,
rotary embeddings, and repeated heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slim_core.errors import StructureError
from slim_ptq.kv.attention_products import AttentionProducts

PARTS = ("k_proj", "v_proj")


@dataclass(frozen=True, eq=False)
class CacheSource:
    """The linear layer whose output goes into the key or the value cache.

    Parameters
    ----------
    linear : str
        Name of the layer.
    part : {"k_proj", "v_proj"}
    channels : torch.Tensor or None
        int64, ascending: the output channels that are cached; None stands for all of them.
    """

    linear: str
    part: str
    channels: torch.Tensor | None = None


def find_cache_sources(
    root: nn.Module, linears: Iterable[str], run: Callable[[], Any], prefix: str = ""
) -> tuple[CacheSource, ...]:
    """Return the sources of the keys and the values of every attention, in order of execution.

    An attention that takes its keys and values from another layer has none of its own.

    Parameters
    ----------
    root : torch.nn.Module
        A model or a decoder block; it is left as it was.
    linears : iterable of str
        Names of the linear layers below ``root``, quantized or not.
    run : callable
        Runs ``root`` on some input; a few tokens are enough.
    prefix : str
        Put before the names of layers in messages.

    Raises
    ------
    StructureError
        No attention was seen, or its keys and values do not each come from one linear layer, as in
        multi-head latent attention.
    """
    search = _Search(prefix)
    handles = [
        root.get_submodule(name).register_forward_hook(search.hook(name)) for name in linears
    ]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _only_activations(root),
            AttentionProducts(search.attention),
        ):
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not search.attentions:
        raise StructureError(
            f"no attention was seen in {type(root).__name__}, so its keys and values are not known",
            hint="load the model with attn_implementation='sdpa' or 'eager'",
        )
    return tuple(search.sources)


class _Search:
    """The leaves since the last attention, and what was found."""

    def __init__(self, prefix: str) -> None:
        self.attentions = 0
        self.sources: list[CacheSource] = []
        self._prefix = prefix
        self._leaves: dict[str, torch.Tensor] = {}

    def hook(self, name: str) -> Any:
        def cut(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            self._leaves[name] = output.detach().requires_grad_()
            return self._leaves[name].clone()  # models clamp such outputs in place

        return cut

    def attention(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take in an attention."""
        self.attentions += 1
        found = [self._channels(key), self._channels(value)]
        self._leaves.clear()
        if not any(found):
            return
        for what, sources in zip(("keys", "values"), found, strict=True):
            if len(sources) != 1:
                listed = ", ".join(self._prefix + name for name in sources) or "none"
                raise StructureError(
                    f"the {what} of an attention come from {len(sources)} linear layers "
                    f"({listed}), and a cache quantized to int8 needs one",
                    hint="multi-head latent attention has no int8 cache",
                )
        (key_linear, keys), (value_linear, values) = (next(iter(f.items())) for f in found)
        if key_linear == value_linear and bool((keys & values).any()):
            raise StructureError(
                f"{self._prefix}{key_linear} gives keys and values in the same channels"
            )
        for part, linear, used in zip(
            PARTS, (key_linear, value_linear), (keys, values), strict=True
        ):
            channels = None if bool(used.all()) else used.nonzero().flatten()
            self.sources.append(CacheSource(linear, part, channels))

    def _channels(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return on which output channels of which layers a tensor depends."""
        if not tensor.requires_grad:
            return {}
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(tensor.shape, generator=generator) + 0.5
        gradients = torch.autograd.grad(
            tensor,
            list(self._leaves.values()),
            weights.to(tensor.device, tensor.dtype),
            retain_graph=True,
            allow_unused=True,
        )
        used = {
            name: (gradient != 0).reshape(-1, gradient.shape[-1]).any(0).cpu()
            for name, gradient in zip(self._leaves, gradients, strict=True)
            if gradient is not None
        }
        return {name: mask for name, mask in used.items() if bool(mask.any())}


@contextlib.contextmanager
def _only_activations(root: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients for a while."""
    parameters = [p for p in root.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)

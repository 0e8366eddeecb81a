"""The query and key weights of each layer, found in the modules of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import StructureError
from slim_ra.alibi import standard_slopes
from slim_ra.families import FAMILIES
from slim_ra.geometry import HeadGeometry, head_geometry, text_config

_TRIPLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"))
_FUSED = ("query_key_value", "Wqkv", "W_pack", "qkv_proj", "c_attn", "wqkv", "in_proj")
_NORMS = ("input_layernorm", "ln_attn", "norm_1", "ln_1", "attention_norm")


@dataclass(frozen=True)
class HeadWeights:
    """Query and key projection of one layer, and the norm before them, all fp64.

    Attributes
    ----------
    query : Tensor
        ``[H, D, d]`` rows of each query head.
    key : Tensor
        ``[H, D, d]`` rows of the key head that each query head uses.
    query_bias, key_bias : Tensor
        ``[H, D]``.
    gain, shift : Tensor
        ``[d]`` weight and bias of the norm before attention.
    slopes : Tensor
        ``[H]`` effective ALiBi slopes.
    scale : float
        Factor of the dot products.
    clip : float or None
        Bound on the magnitude of every entry of q and k.
    """

    query: Tensor
    key: Tensor
    query_bias: Tensor
    key_bias: Tensor
    gain: Tensor
    shift: Tensor
    slopes: Tensor
    scale: float
    clip: float | None = None


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks: the first ModuleList as long as the model has layers.

    Raises
    ------
    StructureError
        There is no ModuleList.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise StructureError("Found no ModuleList in model")
    config = text_config(getattr(model, "config", None))
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    counts = {getattr(config, name, None) for name in names}
    fitting = [found for found in lists if len(found) in counts]
    return list((fitting or lists)[0])


def query_key_linears(block: nn.Module) -> list[nn.Linear]:
    """Return the projections to q, k and v: one fused, two (q and kv), or three.

    Raises
    ------
    StructureError
        None, or more than three, were found.
    """
    attention = _attention_of(block)
    named = dict(attention.named_modules())
    for triple in _TRIPLES:
        found = [named.get(name) for name in triple]
        if all(isinstance(module, nn.Linear) for module in found):
            return [module for module in found if isinstance(module, nn.Linear)]
    for name in _FUSED:
        fused = named.get(name)
        if isinstance(fused, nn.Linear):
            return [fused]
    linears = [module for module in attention.modules() if isinstance(module, nn.Linear)][:-1]
    if not linears:
        raise StructureError("Found no Linear node in model attention block")
    if len(linears) > 3:
        raise StructureError(
            f"Found {len(linears)} Linears node in model attention block, should be <= 3"
        )
    return linears


def alibi_weights(model: nn.Module) -> Iterator[HeadWeights]:
    """Yield the weights of each layer of an ALiBi model in its true layout.

    Bloom, MPT and Falcon by their modules; others (Baichuan's ``W_pack`` and separate projections)
    by rows in the order q, k, v, with the standard slopes.

    Raises
    ------
    StructureError
        The layout is not understood.
    """
    geometry = head_geometry(getattr(model, "config", None))
    for block in decoder_blocks(model):
        yield _layer_weights(block, geometry)


def _layer_weights(block: nn.Module, geometry: HeadGeometry) -> HeadWeights:
    attention: Any = _attention_of(block)
    linears = query_key_linears(block)
    weight = torch.cat([linear.weight.detach() for linear in linears]).double().cpu()
    biases = [
        torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    bias = torch.cat([b.cpu().double() for b in biases])
    query, key = _split_rows(attention, weight, geometry)
    query_bias, key_bias = _split_rows(attention, bias[:, None], geometry)
    norm: Any = _norm_of(block)
    family = FAMILIES.get(type(attention).__name__)
    shift = getattr(norm, "bias", None)
    return HeadWeights(
        query=query,
        key=key,
        query_bias=query_bias[..., 0],
        key_bias=key_bias[..., 0],
        gain=norm.weight.detach().double().cpu(),
        shift=torch.zeros(geometry.hidden_size, dtype=torch.float64)
        if shift is None
        else shift.detach().double().cpu(),
        slopes=standard_slopes(geometry.heads) if family is None else family.slopes(attention),
        scale=geometry.head_dim**-0.5 if family is None else family.scale(attention),
        clip=getattr(attention, "clip_qkv", None) or None,
    )


def _split_rows(attention: Any, fused: Tensor, geometry: HeadGeometry) -> tuple[Tensor, Tensor]:
    """Split rows ``[out, n]`` into q and k ``[H, D, n]`` as the attention class lays them out."""
    heads, dim, columns = geometry.heads, geometry.head_dim, fused.shape[1]
    kind = type(attention).__name__
    falcon_groups = kind == "FalconAttention" and (
        attention.new_decoder_architecture or attention.multi_query
    )
    if falcon_groups:
        groups = attention.num_kv_heads
        rows = fused.view(groups, heads // groups + 2, dim, columns)
        query, key = rows[:, :-2].flatten(0, 1), rows[:, -2]
    elif kind in ("BloomAttention", "FalconAttention"):
        rows = fused.view(heads, 3, dim, columns)
        query, key = rows[:, 0], rows[:, 1]
    else:
        kv_heads = geometry.kv_heads
        expected = (heads + 2 * kv_heads) * dim
        if fused.shape[0] != expected:
            raise StructureError(
                f"the q, k, v projections of {kind} have {fused.shape[0]} rows, not {expected}"
            )
        query = fused[: heads * dim].view(heads, dim, columns)
        key = fused[heads * dim : (heads + kv_heads) * dim].view(kv_heads, dim, columns)
    return query, key.repeat_interleave(heads // key.shape[0], 0)


def _attention_of(block: nn.Module) -> nn.Module:
    for name, child in block.named_children():
        if "att" in name.lower() and any(isinstance(m, nn.Linear) for m in child.modules()):
            return child
    return block


def _norm_of(block: nn.Module) -> nn.Module:
    for name in _NORMS:
        norm = getattr(block, name, None)
        if isinstance(norm, nn.Module) and getattr(norm, "weight", None) is not None:
            return norm
    raise StructureError(
        f"{type(block).__name__} has no norm before attention under a known name: {_NORMS}"
    )

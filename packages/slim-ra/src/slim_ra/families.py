"""Models that compute attention inside their own ``forward``: Bloom, MPT and Falcon.

They do not call the attention interface of transformers.  A :class:`Family` takes such a forward
apart, so that the calibration and the cache can put their own attention in its middle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import StructureError
from slim_ra.alibi import mpt_slopes, standard_slopes
from slim_ra.arguments import cache_argument
from slim_ra.padding import left_padding, mask_padding


@dataclass
class Call:
    """The arguments of one call of an attention module, under common names."""

    module: Any
    hidden: Tensor
    mask: Tensor | None
    cache: Any
    bias: Tensor | None
    residual: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None


class Family(ABC):
    """How one family of models lays out its attention."""

    @abstractmethod
    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Bind the arguments of the module's forward."""

    @abstractmethod
    def project(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Return q ``[B, H, T, D]`` and k, v ``[B, Hkv, T, D]`` with the true KV heads.

        Rotated, in models with rotary positions.
        """

    @abstractmethod
    def finish(self, call: Call, context: Tensor) -> tuple[Tensor, None]:
        """Turn the context ``[B, T, H * D]`` into what the forward returns."""

    @abstractmethod
    def slopes(self, module: Any) -> Tensor:
        """Effective slopes, fp64 ``[H]``: the logit falls by this much a token."""

    def scale(self, module: Any) -> float:
        """Factor of the dot products."""
        return float(module.inv_norm_factor)

    def columns(self, call: Call, length: int) -> Tensor | None:
        """ALiBi bias of key columns ``0 .. length-1``, fp32 ``[B or 1, H, length]``.

        Up to a constant a row; the model's own rounding where it has any.  None in models with
        rotary positions.
        """
        slopes = self.slopes(call.module).to(call.hidden.device)
        positions = torch.arange(1 - length, 1, device=call.hidden.device)
        return (slopes[:, None] * positions).float()[None]

    def padding(self, call: Call) -> Tensor | None:
        """Left padding of each row, int64 ``[B]``, or None when there is none."""
        return mask_padding(call.mask, call.hidden.shape[1])


class _Bloom(Family):
    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        names = ("hidden_states", "residual", "alibi", "attention_mask", "layer_past")
        bound = _bind(names, args, kwargs)
        if module.pretraining_tp > 1 and module.slow_but_exact:
            raise StructureError("Bloom with slow_but_exact and pretraining_tp > 1 is unsupported")
        return Call(
            module,
            bound["hidden_states"],
            bound["attention_mask"],
            bound["layer_past"],
            bound["alibi"],
            bound["residual"],
        )

    def project(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        module = call.module
        fused = module.query_key_value(call.hidden)
        split = fused.view(*fused.shape[:2], module.num_heads, 3, module.head_dim)
        query, key, value = split.permute(3, 0, 2, 1, 4)
        return query, key, value

    def finish(self, call: Call, context: Tensor) -> tuple[Tensor, None]:
        module = call.module
        output = nn.functional.dropout(
            module.dense(context), p=module.hidden_dropout, training=module.training
        )
        return torch.as_tensor(call.residual) + output, None

    def slopes(self, module: Any) -> Tensor:
        return standard_slopes(int(module.num_heads))

    def columns(self, call: Call, length: int) -> Tensor | None:
        if call.bias is None or call.bias.shape[-1] != length:
            return super().columns(call, length)
        return call.bias.view(-1, call.module.num_heads, length).float()


class _Falcon(Family):
    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        names = ("hidden_states", "alibi", "attention_mask", "position_ids", "layer_past")
        bound = _bind(names, args, kwargs)
        return Call(
            module,
            bound["hidden_states"],
            bound["attention_mask"],
            bound["layer_past"],
            bound["alibi"],
            rotary=kwargs.get("position_embeddings") if bound["alibi"] is None else None,
        )

    def project(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        module = call.module
        fused = module.query_key_value(call.hidden)
        batch, length = fused.shape[:2]
        kv_heads = module.num_kv_heads
        if module.new_decoder_architecture or module.multi_query:
            group = module.num_heads // kv_heads
            split = fused.view(batch, length, kv_heads, group + 2, module.head_dim)
            query = split[:, :, :, :-2].flatten(2, 3)
            key, value = split[:, :, :, -2], split[:, :, :, -1]
        else:
            split = fused.view(batch, length, module.num_heads, 3, module.head_dim)
            query, key, value = split.unbind(3)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if call.rotary is not None:
            from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

            query, key = apply_rotary_pos_emb(query, key, *call.rotary)  # type: ignore[no-untyped-call]
        return query, key, value

    def finish(self, call: Call, context: Tensor) -> tuple[Tensor, None]:
        return call.module.dense(context), None

    def slopes(self, module: Any) -> Tensor:
        rounded = standard_slopes(module.num_heads).float().bfloat16().double()
        return rounded * float(module.inv_norm_factor)

    def columns(self, call: Call, length: int) -> Tensor | None:
        if call.rotary is not None:
            return None
        if call.bias is None or call.bias.shape[-1] != length:
            return super().columns(call, length)
        biases = call.bias.reshape(-1, call.module.num_heads, length)
        return biases.float() * float(call.module.inv_norm_factor)


class _Mpt(Family):
    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        cache_name = cache_argument(module)
        names = ("hidden_states", "position_bias", cache_name, "attention_mask")
        bound = _bind(names, args, kwargs)
        return Call(
            module,
            bound["hidden_states"],
            bound["attention_mask"],
            bound[cache_name],
            bound["position_bias"],
        )

    def project(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        module = call.module
        mixed = module.Wqkv(call.hidden)
        if module.clip_qkv:
            mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        split = mixed.view(*mixed.shape[:2], 3, module.n_heads, module.head_dim)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        return query, key, value

    def finish(self, call: Call, context: Tensor) -> tuple[Tensor, None]:
        return call.module.out_proj(context), None

    def slopes(self, module: Any) -> Tensor:
        return mpt_slopes(module.n_heads)

    def scale(self, module: Any) -> float:
        return float(module.softmax_scale)

    def padding(self, call: Call) -> Tensor | None:
        if call.mask is None:
            return None
        return left_padding(~call.mask[:, 0, -1].bool())  # MPT marks what is hidden


FAMILIES: dict[str, Family] = {
    "BloomAttention": _Bloom(),
    "FalconAttention": _Falcon(),
    "MptAttention": _Mpt(),
}


def family_modules(model: nn.Module) -> list[tuple[Any, Family]]:
    """Return the attention modules of known families, in layer order; none in other models."""
    return [
        (module, FAMILIES[type(module).__name__])
        for module in model.modules()
        if type(module).__name__ in FAMILIES
    ]


def alibi_modules(model: nn.Module) -> list[tuple[Any, Family]]:
    """Return the attention modules of an ALiBi model, in layer order, with their family.

    Raises
    ------
    StructureError
        The model has none of the known attention classes.
    """
    found = family_modules(model)
    if not found:
        raise StructureError(
            f"{type(model).__name__} has none of the ALiBi attentions that can be run here "
            f"({', '.join(FAMILIES)})"
        )
    return found


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = dict.fromkeys(names)
    bound.update(zip(names, args, strict=False))
    bound.update({name: kwargs[name] for name in names if name in kwargs})
    return bound

"""ALiBi models: their slopes, and how each family projects, biases and masks.

Bloom, MPT and Falcon compute attention inside their own ``forward`` rather than through the
attention interface of transformers.  A :class:`Family` takes such a forward apart, so that the
calibration and the cache can put their own attention in its middle.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import StructureError


def standard_slopes(heads: int) -> Tensor:
    """Slopes of Press et al. (2022), as in Bloom, Falcon and Baichuan, fp64 ``[heads]``.

    Powers of two get ``2^(-8 i / heads)``; other counts the series of the power of two below,
    then every second one of the doubled series.
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    extra = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (heads - power) + 1, 2)]
    return torch.tensor(slopes + extra, dtype=torch.float64)


def mpt_slopes(heads: int, bias_max: int = 8) -> Tensor:
    """Slopes of MPT, fp64 ``[heads]``; another set and order when ``heads`` is no power of two."""
    power = 2 ** math.ceil(math.log2(heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float64) * (-bias_max / power)
    slopes = torch.exp2(exponents)
    if power == heads:
        return slopes
    return torch.cat([slopes[1::2], slopes[::2]])[:heads]


@dataclass
class Call:
    """The arguments of one call of an attention module, under common names."""

    module: Any
    hidden: Tensor
    mask: Tensor | None
    cache: Any
    bias: Tensor | None
    residual: Tensor | None = None


class Family(ABC):
    """How one family of ALiBi models lays out its attention."""

    @abstractmethod
    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Bind the arguments of the module's forward."""

    @abstractmethod
    def project(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Return q ``[B, H, T, D]`` and k, v ``[B, Hkv, T, D]`` with the true KV heads."""

    @abstractmethod
    def finish(self, call: Call, context: Tensor) -> tuple[Tensor, None]:
        """Turn the context ``[B, T, H * D]`` into what the forward returns."""

    @abstractmethod
    def slopes(self, module: Any) -> Tensor:
        """Effective slopes, fp64 ``[H]``: the logit falls by this much a token."""

    def scale(self, module: Any) -> float:
        """Factor of the dot products."""
        return float(module.inv_norm_factor)

    def columns(self, call: Call, length: int) -> Tensor:
        """Bias of key columns ``0 .. length-1``, fp32 ``[B or 1, H, length]``.

        Up to a constant a row; the model's own rounding where it has any.
        """
        slopes = self.slopes(call.module).to(call.hidden.device)
        positions = torch.arange(1 - length, 1, device=call.hidden.device)
        return (slopes[:, None] * positions).float()[None]

    def padding(self, call: Call) -> Tensor | None:
        """Left padding of each row, int64 ``[B]``, or None when there is none."""
        if call.mask is None:
            return None
        last = call.mask[:, 0, -1]
        hidden = last if last.dtype == torch.bool else last < torch.finfo(last.dtype).min / 2
        return left_padding(~hidden)


def left_padding(real: Tensor) -> Tensor | None:
    """Count the padding at the left of each row of a mask.

    Parameters
    ----------
    real : Tensor
        Bool ``[B, T]``, True at real tokens.

    Returns
    -------
    Tensor or None
        int64 ``[B]``; None when every token is real.

    Raises
    ------
    StructureError
        A row is empty, or has padding after its first real token.
    """
    if bool(real.all()):
        return None
    pads = real.shape[1] - real.sum(1)
    columns = torch.arange(real.shape[1], device=real.device)
    if not torch.equal(real, columns >= pads[:, None]) or bool((pads == real.shape[1]).any()):
        raise StructureError(
            "the attention mask has padding that is not at the left of its row",
            hint="set tokenizer.padding_side = 'left'; every row needs a real token",
        )
    return pads


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

    def columns(self, call: Call, length: int) -> Tensor:
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
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def finish(self, call: Call, context: Tensor) -> tuple[Tensor, None]:
        return call.module.dense(context), None

    def slopes(self, module: Any) -> Tensor:
        rounded = standard_slopes(module.num_heads).float().bfloat16().double()
        return rounded * float(module.inv_norm_factor)

    def columns(self, call: Call, length: int) -> Tensor:
        if call.bias is None or call.bias.shape[-1] != length:
            return super().columns(call, length)
        biases = call.bias.reshape(-1, call.module.num_heads, length)
        return biases.float() * float(call.module.inv_norm_factor)


class _Mpt(Family):
    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        cache_name = "past_key_values" if "past_key_values" in kwargs else "past_key_value"
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


def alibi_modules(model: nn.Module) -> list[tuple[Any, Family]]:
    """Return the attention modules of an ALiBi model, in layer order, with their family.

    Raises
    ------
    StructureError
        The model has none of the known attention classes.
    """
    found = [
        (module, FAMILIES[type(module).__name__])
        for module in model.modules()
        if type(module).__name__ in FAMILIES
    ]
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

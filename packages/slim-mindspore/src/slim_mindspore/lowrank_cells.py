"""The products of smaller cells that stand for one cell."""

from __future__ import annotations

from typing import Any

import numpy as np

from slim_lowrank.factorize import balanced_factors, truncated_svd
from slim_lowrank.tucker import tucker2
from slim_lowrank.whitening import symmetric_power
from slim_mindspore.framework import Tensor, ms, nn
from slim_mindspore.linears import bias_of, weight_of
from slim_mindspore.moments import LayerMoments

Array = np.ndarray


def dense_pair(
    name: str, cell: Any, rank: int, with_weights: bool, seen: LayerMoments | None = None
) -> Any:
    """Return ``Dense(in, rank)`` and ``Dense(rank, out)`` for a linear cell.

    Parameters
    ----------
    name : str
        What errors call the cell.
    cell : Cell
        Its bias and activation go to the second factor.
    rank : int
    with_weights : bool
        False leaves MindSpore's initial values.
    seen : LayerMoments, optional
        Of the cell: the factors then keep outputs, or the loss where gradients were seen, rather
        than the weight, and the bias makes up for the mean error.
    """
    weight = weight_of(cell)
    rows, columns = weight.shape
    dtype = cell.weight.dtype
    bias = bias_of(cell)
    has_bias = bias is not None
    first = nn.Dense(columns, rank, has_bias=False, dtype=dtype)
    last = nn.Dense(rank, rows, has_bias=has_bias, dtype=dtype)
    activation = getattr(cell, "activation", None)
    if activation is not None:
        last.activation, last.activation_flag = activation, True
    if with_weights:
        if seen is None:
            down, up = balanced_factors(truncated_svd(weight, rank, name=f"layer {name!r}"))
        else:
            down, up = seen.problem(weight, centred=has_bias).factors(rank)
            bias = None if bias is None else bias + (weight - up @ down) @ seen.mean
        put(first.weight, down)
        put(last.weight, up)
        if bias is not None:
            put(last.bias, bias)
    return _sequence(cell, first, last)


def embedding_pair(name: str, cell: Any, rank: int, with_weights: bool) -> Any:
    """Return ``Embedding(entries, rank)`` and ``Dense(rank, width)`` for an embedding."""
    table = float_array(cell.embedding_table)
    dtype = cell.embedding_table.dtype
    first = nn.Embedding(
        cell.vocab_size,
        rank,
        use_one_hot=cell.use_one_hot,
        dtype=cell.dtype,
        padding_idx=cell.padding_idx,
    )
    last = nn.Dense(rank, cell.embedding_size, has_bias=False, dtype=dtype)
    if with_weights:
        right, left = balanced_factors(truncated_svd(table, rank, name=f"layer {name!r}"))
        put(first.embedding_table, left)
        put(last.weight, right.T)
    return _sequence(cell, first, last)


def conv_triple(
    name: str,
    cell: Any,
    ranks: tuple[int, int],
    with_weights: bool,
    seen: LayerMoments | None = None,
) -> Any:
    """Return 1 x 1, k x k and 1 x 1 convolutions for a convolution (Tucker-2).

    ``seen`` holds the moments of the channels of all pixels.
    """
    rank_out, rank_in = ranks
    dtype = cell.weight.dtype
    weight = float_array(cell.weight)
    first = nn.Conv2d(cell.in_channels, rank_in, 1, has_bias=False, dtype=dtype)
    middle = nn.Conv2d(
        rank_in,
        rank_out,
        cell.kernel_size,
        stride=cell.stride,
        pad_mode=cell.pad_mode,
        padding=cell.padding,
        dilation=cell.dilation,
        has_bias=False,
        dtype=dtype,
    )
    last = nn.Conv2d(rank_out, cell.out_channels, 1, has_bias=cell.has_bias, dtype=dtype)
    if with_weights:
        back = None
        if seen is not None:
            second = seen.second(np.moveaxis(weight, 1, -1).reshape(-1, weight.shape[1]))
            weight = np.einsum("oihw,ij->ojhw", weight, symmetric_power(second, 0.5))
            back = symmetric_power(second, -0.5)
        found = tucker2(weight, rank_out, rank_in, name=f"layer {name!r}")
        inward = found.u_in.T if back is None else found.u_in.T @ back
        put(first.weight, inward[:, :, None, None])
        put(middle.weight, found.core)
        put(last.weight, found.u_out[:, :, None, None])
        if cell.has_bias:
            last.bias.set_data(cell.bias.value().astype(dtype))
    return _sequence(cell, first, middle, last)


def float_array(parameter: Any) -> Array:
    """Return a parameter as float32."""
    return np.asarray(parameter.astype(ms.float32).asnumpy())


def put(parameter: Any, array: Array) -> None:
    """Set a parameter, in the dtype that it has."""
    values = np.ascontiguousarray(array, np.float32)
    parameter.set_data(Tensor(values).astype(parameter.dtype))


def _sequence(cell: Any, *parts: Any) -> Any:
    """Return the parts in sequence, computing in the precision set on the cell they replace."""
    sequence = nn.SequentialCell(list(parts))
    for flag, dtype in (("fp16", ms.float16), ("bf16", ms.bfloat16), ("fp32", ms.float32)):
        if cell.get_flags().get(flag):
            return sequence.to_float(dtype)
    return sequence

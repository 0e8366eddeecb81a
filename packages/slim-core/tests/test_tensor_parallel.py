"""Layers that are stored as slices of their input channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slim_core.errors import FormatError
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme
from slim_core.tensor_parallel import SlicedLinear, count_slices, layer_of, read_sliced, slice_name

RNG = np.random.default_rng(0)


def test_names() -> None:
    assert slice_name("a.o_proj", 3) == "a.o_proj.tp_list.3"
    assert layer_of("a.o_proj.tp_list.3") == layer_of("a.o_proj") == "a.o_proj"


def test_slices_are_counted_by_layer() -> None:
    names = ["b.q", "b.o.tp_list.1", "b.o.tp_list.0", "c.o.tp_list.0"]
    assert count_slices(names) == {"b.o": 2, "c.o": 1}
    with pytest.raises(FormatError, match=r"slices of b\.o must be numbered from 0 on, not 0, 2"):
        count_slices(["b.o.tp_list.0", "b.o.tp_list.2"])


def make(index: int, scheme: str, bias: bool) -> QuantizedLinear:
    rows, columns = 6, 4
    scale = RNG.random((1,) if scheme.endswith("_tensor") else (rows, 1), np.float32) + 0.5
    return QuantizedLinear(
        slice_name("o", index),
        QuantScheme.parse(scheme),
        RNG.integers(-127, 128, (rows, columns), np.int8),
        scale,
        np.zeros_like(scale),
        np.ones(1, np.float32),
        np.zeros(1, np.float32),
        np.ones(rows, np.float32) if bias else None,
    )


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_tensor"])
def test_joined_weight_is_that_of_the_slices_side_by_side(scheme: str) -> None:
    slices = tuple(make(index, scheme, bias=index == 0) for index in range(3))
    joined = SlicedLinear("o", slices).joined()
    expected = np.concatenate([layer.dequantized() for layer in slices], axis=1)
    np.testing.assert_array_equal(joined.dequantized(), expected)
    assert (joined.name, joined.bias is not None, joined.input_scale) == ("o", True, None)


def stored(slices: tuple[QuantizedLinear, ...], **scales: Any) -> dict[str, np.ndarray]:
    weight = np.concatenate([layer.codes for layer in slices], axis=1)
    return {"o.weight": weight} | {f"o.{name}": scale for name, scale in scales.items()}


def test_scales_are_read() -> None:
    slices = (make(0, "w8a8", bias=True), make(1, "w8a8", bias=False))
    ones = np.ones(6, np.float32)
    plain = stored(slices)
    found = read_sliced("o", slices, plain, plain.__getitem__)
    assert found.reduce_scale is None
    assert found.gather_scale is None
    shared = stored(slices, reduce_scale=ones, gather_scale=2 * ones)
    found = read_sliced("o", slices, shared, shared.__getitem__)
    np.testing.assert_array_equal(found.reduce_scale, ones[None])
    np.testing.assert_array_equal(found.gather_scale, 2 * ones)
    own = stored(
        slices, **{"reduce_scale.0": ones, "reduce_scale.1": 3 * ones, "gather_scale": ones}
    )
    found = read_sliced("o", slices, own, own.__getitem__)
    np.testing.assert_array_equal(found.reduce_scale, np.stack([ones, 3 * ones]))


def test_slices_must_fit_one_another() -> None:
    first, second = make(0, "w8a8", bias=True), make(1, "w8a8", bias=True)
    tensors = stored((first, second))
    with pytest.raises(FormatError, match="only the first slice of o can have a bias"):
        read_sliced("o", (first, second), tensors, tensors.__getitem__)
    narrow = second.map_tensors(lambda array: array)
    narrow = QuantizedLinear("o.tp_list.1", narrow.scheme, narrow.codes[:, :2], *[np.ones(1)] * 2)
    with pytest.raises(FormatError, match="slices of o differ in shape"):
        read_sliced("o", (first, narrow), tensors, tensors.__getitem__)

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.errors import FormatError, NumericalError
from slim_mindspore.ckpt import read_ckpt
from slim_mindspore.sparse import quantize_sparse, stored_layer
from slim_mindspore.sparse_format import decode_sparse, encode_sparse

FLOAT_LAYERS = {"lm_head", "model.layers.0.attention.wo"}


def reference(weight, fraction):
    """The formulas again, element by element and without any of our helpers."""
    ordered = sorted(np.abs(weight).reshape(-1).tolist(), reverse=True)
    threshold = ordered[int(weight.size * fraction) - 1]
    codes = np.zeros(weight.shape, np.int64)
    scales = np.zeros(len(weight), np.float32)
    for i, row in enumerate(weight):
        scales[i] = np.float32(max(abs(v) for v in row if abs(v) <= threshold)) / np.float32(7)
        for j, value in enumerate(row):
            codes[i, j] = np.clip(np.rint(value / scales[i]), -127, 127)
    return codes, scales


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(2, 20),
    columns=st.integers(50, 80),
    fraction=st.floats(0.01, 0.1),
)
def test_formulas(seed, rows, columns, fraction):
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    found = quantize_sparse("w", weight, fraction)
    codes, scales = reference(weight, fraction)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale[:, 0], scales)
    count = int(weight.size * fraction)
    assert found.outliers == count - 1
    inlier = np.abs(weight) <= np.sort(np.abs(weight).reshape(-1))[-count]
    assert np.abs(found.codes[inlier]).max() <= 7


def test_rows_without_inliers_stay_finite():
    weight = np.zeros((4, 100), np.float32)
    weight[0, 3] = 5.0
    weight[1, :] = np.linspace(0.1, 0.2, 100)
    found = quantize_sparse("w", weight, 0.01)
    assert (found.scale > 0).all()
    restored = found.dequantized()
    assert restored[0, 3] == pytest.approx(5.0, rel=1e-6)
    assert not restored[2:].any()


def test_bad_weights():
    with pytest.raises(FormatError, match="w must be a matrix"):
        quantize_sparse("w", np.zeros(3, np.float32), 0.01)
    with pytest.raises(NumericalError, match="w has 1 NaN"):
        quantize_sparse("w", np.full((1, 1), np.nan, np.float32), 0.01)
    weight = quantize_sparse("w", np.ones((2, 2), np.float32), 0.01)
    with pytest.raises(FormatError, match="layer: float16 cannot hold the input scale 1e-12"):
        stored_layer("layer", weight, 1e-12, 0, None)


@pytest.fixture
def layer():
    random = np.random.default_rng(1)
    weight = quantize_sparse("p", random.standard_normal((6, 200)).astype(np.float32), 0.05)
    return stored_layer("p", weight, 0.03, -7, random.standard_normal(6).astype(np.float32))


def test_file_tensors(layer):
    tensors = encode_sparse(layer)
    assert [(n, t.dtype.name, t.shape) for n, t in tensors.items()] == [
        ("weight", "int8", (6, 200)),
        ("input_scale", "float16", (1,)),
        ("input_offset", "int8", (1,)),
        ("quant_bias", "int32", (6,)),
        ("deq_scale", "int64", (6,)),
    ]
    bits = tensors["deq_scale"].astype(np.uint32).view(np.float32)
    ratio = bits / tensors["input_scale"].astype(np.float32) / layer.weight_scale[:, 0]
    np.testing.assert_allclose(ratio, 1, rtol=1e-6)
    assert encode_sparse(layer, "float32")["weight"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_file_round_trip(layer, dtype):
    tensors = encode_sparse(layer, dtype)
    back = decode_sparse("p", tensors)
    for name, array in encode_sparse(back, dtype).items():
        if name == "deq_scale":  # one float32 division and multiplication apart
            assert np.abs(array - tensors[name]).max() <= 1
        else:
            np.testing.assert_array_equal(array, tensors[name])
    deq = layer.input_scale * layer.weight_scale[:, 0]
    assert (np.abs(back.bias - layer.bias) <= 0.51 * deq).all()


def test_damaged_tensors_are_named(layer):
    tensors = encode_sparse(layer)
    del tensors["deq_scale"]
    with pytest.raises(FormatError, match="p has no deq_scale"):
        decode_sparse("p", tensors)
    tensors = encode_sparse(layer) | {"quant_bias": np.zeros(5, np.int32)}
    with pytest.raises(FormatError, match=r"p.quant_bias must be int32 of shape \(6,\)"):
        decode_sparse("p", tensors)
    tensors = encode_sparse(layer, "float32")
    tensors["weight"][0, 0] = 0.5
    with pytest.raises(FormatError, match="no int8 codes"):
        decode_sparse("p", tensors)


@pytest.mark.parametrize("biased", [False, True])
def test_integer_arithmetic_equals_fake_quantization(layer, biased):
    tensors = encode_sparse(layer if biased else replace(layer, bias=None))
    x = np.random.default_rng(2).uniform(-4, 4, (10, 200)).astype(np.float32)
    scale = tensors["input_scale"].astype(np.float32)
    codes = np.clip(np.rint(x / scale + tensors["input_offset"]), -128, 127)
    total = codes.astype(np.int64) @ tensors["weight"].astype(np.int64).T + tensors["quant_bias"]
    deq = tensors["deq_scale"].astype(np.uint32).view(np.float32)
    integer = total * deq
    restored = (codes - tensors["input_offset"]) * scale
    # The file stands for a bias that is rounded to whole steps of deq.
    stands_for = decode_sparse("p", tensors).bias
    fake = restored @ layer.dequantized().T + stands_for
    assert np.linalg.norm(integer - fake) <= 1e-5 * np.linalg.norm(fake)
    assert (np.abs(stands_for - (layer.bias if biased else 0)) <= 0.51 * deq).all()


@pytest.mark.oracle
def test_the_reference_tool_wrote_the_same_integers(golden):
    source, quantized = read_ckpt(golden / "model.ckpt"), read_ckpt(golden / "quant.ckpt")
    names = [key.removesuffix(".deq_scale") for key in quantized if key.endswith(".deq_scale")]
    assert len(names) == 13
    assert not FLOAT_LAYERS & set(names)
    for name in names:
        weight = quantize_sparse(name, source[f"{name}.weight"], 0.03)
        scale = float(quantized[f"{name}.input_scale"][0])
        offset = float(quantized[f"{name}.input_offset"][0])
        tensors = encode_sparse(stored_layer(name, weight, scale, offset, None), "float32")
        for local, array in tensors.items():
            expected = quantized[f"{name}.{local}"]
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected, err_msg=f"{name}.{local}")

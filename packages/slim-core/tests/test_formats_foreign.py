"""The layouts of GPTQ, AWQ and compressed-tensors, against loops over their published bits."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import FormatError
from slim_core.formats import FORMATS
from slim_core.formats.words import pack_words, unpack_words
from slim_core.layers import QuantizedLinear
from slim_core.numerics import quantize_weight, weight_params
from slim_core.scheme import FLOAT, QuantScheme
from slim_core.verify_layer import layer_problems

GPTQ, AWQ, CT = (FORMATS[name] for name in ("gptq", "awq", "compressed_tensors"))
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def layer(scheme, rows=16, columns=64, seed=0, dtype="float32", bias=True):
    """A quantized layer whose scales float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(seed)
    parsed = QuantScheme.parse(scheme)
    weight = rng.standard_normal((rows, columns)).astype(np.float32) + 0.3
    scale, _ = weight_params(weight, parsed.weight)
    scale = 2.0 ** np.ceil(np.log2(scale)).astype(np.float32)
    offset = np.zeros_like(scale)
    if not parsed.weight.symmetric:
        offset = rng.integers(parsed.weight.dtype.min, parsed.weight.dtype.max, scale.shape)
        offset = offset.astype(np.float32)
    codes = quantize_weight(weight, scale, offset, parsed.weight)
    inputs = {}
    if parsed.is_static:
        inputs = {
            "input_scale": np.array([0.25], np.float32),
            "input_offset": np.array([-7.0], np.float32),
        }
    return QuantizedLinear(
        "m.q_proj",
        parsed,
        codes,
        scale,
        offset,
        bias=rng.standard_normal(rows).astype(np.float32) if bias else None,
        model_dtype=dtype,
        **inputs,
    )


@given(
    st.sampled_from([2, 4, 8]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_words(bits, rows, columns, axis, reorder):
    rng = np.random.default_rng(rows * 31 + columns)
    values = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    order = rng.permutation(32 // bits) if reorder else None
    words = pack_words(values, bits, axis, order)
    assert words.dtype == np.int32
    length = values.shape[axis]
    assert np.array_equal(unpack_words(words, bits, axis, length, order), values)
    table = np.moveaxis(values, axis, -1)
    moved = np.moveaxis(words, axis, -1)
    for row in range(table.shape[0]):
        for place in range(length):
            word = int(moved[row, place * bits // 32]) & 0xFFFFFFFF
            at = place % (32 // bits)
            if order is not None:
                at = list(order).index(at)
            assert (word >> (at * bits)) & ((1 << bits) - 1) == table[row, place]


@pytest.mark.parametrize(
    "scheme", ["w4a16_g32", "w4a16", "w4a16_g32_asym", "w8a16_g32", "w8a16_asym"]
)
def test_gptq(scheme):
    made = layer(scheme)
    tensors = GPTQ.encode(made)
    bits = made.scheme.weight.dtype.bits
    per_word, half = 32 // bits, 1 << (bits - 1)
    groups = made.weight_scale.shape[1]
    assert tensors["qweight"].shape == (64 // per_word, 16)
    assert tensors["qzeros"].shape == (groups, 16 // per_word)
    assert tensors["scales"].dtype == np.float16
    assert tensors["scales"].shape == (groups, 16)
    mask = (1 << bits) - 1
    for column in range(64):
        group = int(tensors["g_idx"][column])
        assert group == column // (64 // groups)
        for row in range(16):
            word = int(tensors["qweight"][column // per_word, row]) & 0xFFFFFFFF
            code = (word >> (column % per_word * bits)) & mask
            zeros = int(tensors["qzeros"][group, row // per_word]) & 0xFFFFFFFF
            stored = (zeros >> (row % per_word * bits)) & mask
            zero = stored if scheme.endswith("_asym") else stored + 1  # versions 2 and 1
            assert code == int(made.codes[row, column]) + half
            assert zero == made.weight_offset[row, group] + half
            assert tensors["scales"][group, row] == made.weight_scale[row, group]


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16", "w4a16_g32_asym"])
def test_awq(scheme):
    made = layer(scheme)
    tensors = AWQ.encode(made)
    groups = made.weight_scale.shape[1]
    assert tensors["qweight"].shape == (64, 2)
    assert tensors["qzeros"].shape == (groups, 2)
    for column in range(64):
        for row in range(16):
            place = AWQ_COLUMNS.index(row % 8)
            word = int(tensors["qweight"][column, row // 8]) & 0xFFFFFFFF
            assert (word >> (4 * place)) & 15 == int(made.codes[row, column]) + 8
            zeros = int(tensors["qzeros"][column * groups // 64, row // 8]) & 0xFFFFFFFF
            zero = made.weight_offset[row, column * groups // 64] + 8
            assert (zeros >> (4 * place)) & 15 == zero


@given(
    st.sampled_from(["gptq", "awq", "compressed_tensors", "ascend_v1", "safe_tensor"]),
    st.sampled_from(["w4a16", "w4a16_g32", "w4a16_g32_asym"]),
    st.integers(0, 1000),
)
def test_every_code_of_four_bits_comes_back(form, scheme, seed):
    rng = np.random.default_rng(seed)
    made = layer(scheme, rows=16, columns=64, seed=seed)
    codes = rng.integers(-8, 8, made.codes.shape).astype(np.int8)
    codes[0, :16] = np.arange(-8, 8)
    made = replace(made, codes=codes)
    kind = FORMATS[form]
    tensors = kind.encode(made)
    found = kind.decode(made.name, made.scheme, tensors, "float32")
    assert np.array_equal(found.codes, codes)
    assert np.array_equal(found.dequantized(), made.dequantized())
    assert not list(layer_problems(found, tensors))


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        *((GPTQ, s) for s in ("w4a16", "w4a16_g32", "w4a16_g32_asym", "w8a16", "w8a16_g32_asym")),
        *((AWQ, s) for s in ("w4a16", "w4a16_g32", "w4a16_g32_asym")),
        *((CT, s) for s in ("w4a16", "w4a16_g32", "w4a16_g32_asym", "w8a16", "w8a16_asym")),
        *((CT, s) for s in ("w8a8", "w8a8_dynamic")),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_and_size(form, scheme, dtype):
    made = layer(scheme, rows=24, columns=96 if "_g" in scheme else 40, dtype=dtype)
    shape = made.codes.shape
    assert form.unsupported(made.scheme, shape) is None
    tensors = form.encode(made)
    found = form.decode(made.name, made.scheme, tensors, dtype)
    for name in ("codes", "weight_scale", "weight_offset", "input_scale", "input_offset", "bias"):
        expected = getattr(made, name)
        if expected is not None:
            assert np.array_equal(getattr(found, name), expected), name
    sizes = sum(array.nbytes for local, array in tensors.items() if local != "bias")
    assert form.nbytes(made.name, made.scheme, shape, dtype) == sizes


def test_compressed_tensors_words():
    made = layer("w4a16_g32_asym", dtype="bfloat16")
    tensors = CT.encode(made)
    assert tensors["weight_packed"].shape == (16, 8)
    assert tensors["weight_zero_point"].shape == (2, 2)
    assert tensors["weight_scale"].dtype == ml_dtypes.bfloat16
    assert tensors["weight_shape"].tolist() == [16, 64]
    for row in range(16):
        for column in range(64):
            word = int(tensors["weight_packed"][row, column // 8]) & 0xFFFFFFFF
            assert (word >> (4 * (column % 8))) & 15 == int(made.codes[row, column]) + 8
        for group in range(2):
            word = int(tensors["weight_zero_point"][row // 8, group]) & 0xFFFFFFFF
            assert (word >> (4 * (row % 8))) & 15 == made.weight_offset[row, group] + 8


@pytest.mark.parametrize(
    ("form", "scheme", "shape", "says"),
    [
        (GPTQ, "w8a8", (16, 64), "w4a16 and w8a16 only"),
        (GPTQ, "w4a16", (12, 64), "12 output channels"),
        (GPTQ, "w4a16", (16, 60), "60 input channels"),
        (GPTQ, "w8a16_tensor", (16, 64), "w4a16 and w8a16 only"),
        (GPTQ, "w4a16_g128", (16, 64), "does not divide"),
        (AWQ, "w8a16", (16, 64), "w4a16 only"),
        (AWQ, "w4a16", (12, 64), "12 output channels"),
        (CT, "w8a8s", (16, 64), "holds w4a16"),
        (CT, "w4a8_dynamic_g32", (16, 64), "holds w4a16"),
        (CT, "nf4", (16, 64), "holds w4a16"),
        (CT, "w4a16_g128", (16, 64), "does not divide"),
    ],
)
def test_what_they_cannot_hold(form, scheme, shape, says):
    assert says in form.unsupported(QuantScheme.parse(scheme), shape)


@pytest.mark.parametrize("form", [GPTQ, AWQ, CT])
def test_fractional_zero_points_are_refused_not_rounded(form):
    made = layer("w4a16_g32_asym")
    with pytest.raises(FormatError, match=r"m\.q_proj has fractional zero points"):
        form.encode(replace(made, weight_offset=made.weight_offset * 0 + 0.5))


def test_configurations():
    scheme = QuantScheme.parse("w4a16_g32")
    layers = {"m.0.q_proj": scheme, "m.0.k_proj": FLOAT}
    gptq = GPTQ.config_changes("W4A16", layers)["quantization_config"]
    assert (gptq["bits"], gptq["group_size"], gptq["sym"]) == (4, 32, True)
    assert list(gptq["dynamic"]) == ["-:^m\\.0\\.k_proj$"]
    awq = AWQ.config_changes("W4A16", layers)["quantization_config"]
    assert awq["modules_to_not_convert"] == ["lm_head", "m.0.k_proj"]
    mixed = {**layers, "m.0.o_proj": QuantScheme.parse("w8a8_dynamic")}
    config = CT.config_changes("W4A16", mixed)["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [
        ["m.0.q_proj"],
        ["m.0.o_proj"],
    ]
    assert config["format"] == "mixed-precision"
    with pytest.raises(FormatError, match="one scheme for all layers"):
        GPTQ.config_changes("W4A16", mixed)

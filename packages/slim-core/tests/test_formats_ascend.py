"""Golden bytes, round trips and refusals of the two Ascend layouts."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slim_core.errors import FormatError
from slim_core.formats import (
    DESCRIPTION_FILE,
    FORMATS,
    decode_deq_scale,
    encode_deq_scale,
    to_numpy,
)
from slim_core.layers import QuantizedLinear
from slim_core.numerics import quantize_weight, weight_params
from slim_core.scheme import QuantScheme

F32 = np.float32
BF16 = ml_dtypes.bfloat16
ASCEND = [FORMATS["ascend_v1"], FORMATS["safe_tensor"]]
SCHEMES = ["w8a8", "w8a8_tensor", "w8a8_dynamic", "w8a16", "w8a16_asym", "w8a16_g8", "w8a8s"]

both = pytest.mark.parametrize("form", ASCEND, ids=lambda form: form.name)


def layer(text="w8a8", model_dtype="bfloat16", *, bias=True, rows=4, columns=16, seed=0):
    scheme = QuantScheme.parse(text)
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(F32)
    scale, offset = weight_params(weight, scheme.weight)
    static = {}
    if scheme.is_static:
        static = {"input_scale": F32([0.03125]), "input_offset": F32([-17.0])}
    return QuantizedLinear(
        "model.layers.0.mlp.up_proj",
        scheme,
        quantize_weight(weight, scale, offset, scheme.weight),
        scale,
        offset,
        bias=np.linspace(-1, 1, rows).astype(model_dtype) if bias else None,
        model_dtype=model_dtype,
        **static,
    )


# --- the scale of the integer product -------------------------------------------------------------


def test_bit_pattern_of_a_published_example():
    # 0x37378ff3 is stored for a product of scales printed as 0.00041 and 0.02666.
    value = decode_deq_scale(np.array([926388211]))
    assert value.dtype == F32
    assert value.tolist() == [float.fromhex("0x1.6f1fe6p-17")]
    np.testing.assert_allclose(value, 0.00041 * 0.02666, rtol=0.005 / 0.41)
    assert encode_deq_scale(value, "float16").tolist() == [926388211]


@pytest.mark.parametrize(
    ("value", "bits"), [(1.0, 0x3F800000), (0.5, 0x3F000000), (2.0**-126, 0x00800000), (0.0, 0)]
)
def test_bit_patterns_of_round_numbers(value, bits):
    assert encode_deq_scale(F32([value]), "float16").tolist() == [bits]
    assert encode_deq_scale(F32([value]), "float32").tolist() == [bits]


@given(arrays(F32, 5, elements=st.floats(0, 2.0**100, width=32)))
def test_deq_scale_is_kept_bit_for_bit(scale):
    for dtype in ("float16", "float32", "bfloat16"):
        stored = encode_deq_scale(scale, dtype)
        assert stored.dtype == (F32 if dtype == "bfloat16" else np.int64)
        # Engines cut the low half out of the int64; the high half must be empty.
        if dtype != "bfloat16":
            assert stored.tobytes()[0::8] == scale.tobytes()[0::4]
            assert np.all(stored >> 32 == 0)
        assert decode_deq_scale(stored).tobytes() == scale.tobytes()


def test_deq_scale_of_a_column_view():
    scale = np.arange(1, 9, dtype=F32).reshape(4, 2)[:, 0]
    assert decode_deq_scale(encode_deq_scale(scale, "float16")).tolist() == scale.tolist()


# --- tensors --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("model_dtype", "stored"), [("bfloat16", F32), ("float16", np.int64)])
def test_static_layer(form, model_dtype, stored):
    one = layer("w8a8", model_dtype)
    tensors = form.encode(one)
    kinds = {key: (array.dtype, array.shape) for key, array in tensors.items()}
    assert kinds == {
        "weight": (np.int8, (4, 16)),
        "weight_scale": (F32, (4, 1)),
        "weight_offset": (F32, (4, 1)),
        "input_scale": (F32, (1,)),
        "input_offset": (F32, (1,)),
        "quant_bias": (np.int32, (4,)),
        "deq_scale": (stored, (4,)),
        "bias": (np.dtype(model_dtype), (4,)),
    }
    np.testing.assert_array_equal(tensors["weight_offset"], 0)
    deq_scale = F32(0.03125) * one.weight_scale[:, 0]
    assert decode_deq_scale(tensors["deq_scale"]).tobytes() == deq_scale.tobytes()
    quant_bias = np.rint(
        one.bias.astype(float) / deq_scale.astype(float) + 17 * one.codes.sum(axis=1, dtype=int)
    )
    np.testing.assert_array_equal(tensors["quant_bias"], quant_bias)


@both
@pytest.mark.parametrize(
    ("text", "shape"),
    [("w8a8_dynamic", (4, 1)), ("w8a16", (4, 1)), ("w8a16_g8", (4, 2)), ("w8a16_asym", (4, 1))],
)
def test_layer_without_activation_parameters(form, text, shape):
    one = layer(text, bias=False)
    tensors = form.encode(one)
    assert {key: (array.dtype, array.shape) for key, array in tensors.items()} == {
        "weight": (np.int8, (4, 16)),
        "weight_scale": (F32, shape),
        "weight_offset": (F32, shape),
    }
    assert bool(tensors["weight_offset"].any()) is (not one.scheme.weight.symmetric)


@both
def test_golden_bytes(form):
    one = QuantizedLinear(
        "a",
        QuantScheme.parse("w8a8"),
        np.array([[1, -2], [-127, 127]], np.int8),
        F32([[0.5], [0.25]]),
        F32([[0.0], [0.0]]),
        F32([0.5]),
        F32([3.0]),
        bias=np.array([0.125, -1.0], np.float16),
        model_dtype="float16",
    )
    assert {key: array.tobytes().hex() for key, array in form.encode(one).items()} == {
        "weight": "01fe817f",
        "weight_scale": "0000003f0000803e",
        "weight_offset": "0000000000000000",
        "input_scale": "0000003f",
        "input_offset": "00004040",
        # 0.125 / 0.25 - 3 * -1 = 3.5 and -1 / 0.125 - 3 * 0 = -8
        "quant_bias": "04000000f8ffffff",
        "deq_scale": "0000803e000000000000003e00000000",
        "bias": "003000bc",
    }


@both
@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("model_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(form, text, model_dtype, bias):
    one = layer(text, model_dtype, bias=bias)
    tensors = form.encode(one)
    back = form.decode(one.name, one.scheme, tensors, model_dtype)
    assert (back.name, back.scheme, back.model_dtype) == (one.name, one.scheme, model_dtype)
    for key in ("codes", "weight_scale", "weight_offset", "input_scale", "input_offset", "bias"):
        ours, theirs = getattr(one, key), getattr(back, key)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            assert ours.tobytes() == theirs.tobytes()
    again = form.encode(back)
    assert {key: array.tobytes() for key, array in again.items()} == {
        key: array.tobytes() for key, array in tensors.items()
    }
    np.testing.assert_array_equal(back.dequantized(), one.dequantized())


@both
def test_entries_name_every_tensor(form):
    one = layer("w8a8")
    tensors = form.encode(one)
    entries = form.entries(one, tensors)
    assert list(entries) == list(tensors)
    assert entries.pop("bias") == "FLOAT"
    assert set(entries.values()) == {"W8A8"}


# --- refusals -------------------------------------------------------------------------------------


def decode(change, text="w8a8", model_dtype="bfloat16"):
    one = layer(text, model_dtype)
    tensors = FORMATS["ascend_v1"].encode(one)
    change(tensors)
    return FORMATS["ascend_v1"].decode("x.up", one.scheme, tensors, model_dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight"), "x.up has no weight; its tensors are bias, deq_scale, input_"),
        (lambda t: t.pop("input_scale"), "x.up has no input_scale"),
        (lambda t: t.pop("quant_bias"), "x.up has no quant_bias"),
        (lambda t: t.update(weight=t["weight"].astype(F32)), "x.up.weight must be int8, not float"),
        (
            lambda t: t.update(weight=t["weight"][0]),
            "x.up.weight must have two dimensions, not shape",
        ),
        (
            lambda t: t.update(weight_scale=t["weight_scale"][:, 0]),
            r"x.up.weight_scale must have shape \(4, 1\), not \(4,\)",
        ),
        (
            lambda t: t.update(deq_scale=encode_deq_scale(t["deq_scale"], "float16")),
            "x.up.deq_scale must be float32, not int64",
        ),
        (
            lambda t: t.update(quant_bias=t["quant_bias"][:2]),
            r"x.up.quant_bias must have shape \(4,\), not \(2,\)",
        ),
        (
            lambda t: t.update(input_offset=t["input_offset"].astype(np.int8)),
            "x.up.input_offset must be float32, not int8",
        ),
    ],
)
def test_damaged_layers_are_named(change, message):
    with pytest.raises(FormatError, match=message):
        decode(change)


def test_deq_scale_follows_the_dtype_of_the_model():
    with pytest.raises(FormatError, match="deq_scale must be int64, not float32"):
        decode(
            lambda t: t.update(deq_scale=decode_deq_scale(t["deq_scale"])), model_dtype="float16"
        )


@both
def test_group_size_must_divide(form):
    scheme = QuantScheme.parse("w8a16_g128")
    assert form.unsupported(scheme, (64, 256)) is None
    assert form.unsupported(scheme, (64, 200)) == (
        "group size 128 does not divide its 200 input channels"
    )
    codes = np.zeros((4, 100), np.int8)
    tensors = {
        "weight": codes,
        "weight_scale": np.ones((4, 3), F32),
        "weight_offset": np.zeros((4, 3), F32),
    }
    with pytest.raises(FormatError, match="a cannot be w8a16_g32: group size 32 does not divide"):
        form.decode("a", QuantScheme.parse("w8a16_g32"), tensors, "bfloat16")


# --- files and description ------------------------------------------------------------------------


def test_file_names():
    v1, plain = ASCEND
    for form in ASCEND:
        assert form.weight_file("W8A8_DYNAMIC") == "quant_model_weight_w8a8_dynamic"
    assert v1.description_file("W8A8") == DESCRIPTION_FILE == "quant_model_description.json"
    assert plain.description_file("W8A8") == "quant_model_description_w8a8.json"


def test_description_keys():
    v1, plain = ASCEND
    assert v1.description("W8A16", 128) == {
        "version": "1.0.0",
        "model_quant_type": "W8A16",
        "group_size": 128,
        "metadata": {},
        "optional": {},
    }
    assert plain.description("W8A16", 128) == {"model_quant_type": "W8A16"}
    assert v1.description("W4A4_MXFP4_FLATQUANT", 32)["max_supported_tp"] == 1


def test_formats_by_name():
    assert list(FORMATS)[:3] == ["ascend_v1", "safe_tensor", "float"]
    assert set(FORMATS) - set(list(FORMATS)[:3]) == {"compressed_tensors", "gptq", "awq"}
    assert all(form.name == name for name, form in FORMATS.items())


def test_to_numpy_keeps_or_converts():
    array = np.array([1.5, 2.5], BF16)
    assert to_numpy(array) is array
    assert to_numpy(array, np.float32).tolist() == [1.5, 2.5]
    codes = np.ones(2, np.int8)
    assert to_numpy(codes, np.int8) is codes


def test_asymmetric_offsets_are_kept():
    one = layer("w8a16_asym")
    shifted = replace(one, weight_offset=one.weight_offset + 1)
    assert not np.array_equal(shifted.dequantized(), one.dequantized())
    stored = FORMATS["ascend_v1"].encode(shifted)["weight_offset"]
    np.testing.assert_array_equal(stored, one.weight_offset + 1)

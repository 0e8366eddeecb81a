"""The bytes of each type in both Ascend layouts, against loops over the published order."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.errors import FormatError
from slim_core.formats import FORMATS, Format
from slim_core.kronecker import identity_transforms
from slim_core.layers import QuantizedLinear
from slim_core.numerics import quantize_weight, weight_params
from slim_core.quantized import format_of, scheme_of
from slim_core.scheme import KNOWN_SCHEMES, QuantScheme, ScaleKind, Variant
from slim_core.tables import FP4, NF4
from slim_core.two_stage import SECOND_SCALE, quantize_two_stage, two_stage_scales

F32 = np.float32
V1, PLAIN = FORMATS["ascend_v1"], FORMATS["safe_tensor"]
TYPES = [text for text in KNOWN_SCHEMES if text != "float"]

both = pytest.mark.parametrize("form", [V1, PLAIN], ids=lambda form: form.name)


def layer(
    text: str,
    shape: tuple[int, int] = (4, 128),
    name: str = "model.layers.0.mlp.up_proj",
    model_dtype: str = "float16",
    seed: int = 0,
) -> QuantizedLinear:
    """Return a layer of random weights, rounded to nearest."""
    scheme = QuantScheme.parse(text)
    assert scheme.weight is not None
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(F32)
    extras: dict[str, Any] = {}
    if scheme.weight.scales is ScaleKind.TWO_STAGE:
        scale, extras[SECOND_SCALE] = two_stage_scales(weight, scheme.weight.group_size)
        offset = np.zeros_like(scale)
        codes = quantize_two_stage(weight, scale, extras[SECOND_SCALE])
    else:
        scale, offset = weight_params(weight, scheme.weight)
        codes = quantize_weight(weight, scale, offset, scheme.weight)
    if scheme.variant is Variant.FLATQUANT:
        extras = {
            key: array + rng.standard_normal(array.shape).astype(F32) / 8
            for key, array in identity_transforms(shape[1], scale).items()
        } | {"clip_ratio": F32([0.75])}
    static = {}
    if scheme.is_static:
        static = {"input_scale": F32([0.03125]), "input_offset": F32([-17.0])}
    bias = rng.standard_normal(shape[0]).astype(model_dtype)
    return QuantizedLinear(
        name,
        scheme,
        codes,
        scale,
        offset,
        bias=bias,
        model_dtype=model_dtype,
        extras=extras,
        **static,
    )


def nibbles(array: np.ndarray) -> np.ndarray:
    """Return the low and the high nibble of each byte as unsigned numbers, on a last axis of 2."""
    return np.array([[int(b) & 15, int(b) >> 4] for b in array.tobytes()]).reshape(*array.shape, 2)


# --- what is stored -------------------------------------------------------------------------------

W = "weight"
PAIR = {"weight_scale": (F32, (4, 1)), "weight_offset": (F32, (4, 1))}
STATIC = {
    "input_scale": (F32, (1,)),
    "input_offset": (F32, (1,)),
    "quant_bias": (np.int32, (4,)),
    "deq_scale": (np.int64, (4,)),
}
SECOND = {"weight_scale_second": (F32, (4, 2))}
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # safe_tensor, ascend_v1
    "w4a16": (
        {W: (np.int8, (4, 128)), **PAIR},
        {W: (np.int8, (4, 64)), **PAIR},
    ),
    "w4a16_g64": (
        {W: (np.int8, (4, 128)), **{key: (F32, (4, 2)) for key in PAIR}},
        {W: (np.int8, (2, 128)), **{key: (F32, (4, 2)) for key in PAIR}},
    ),
    "w4a8_dynamic": (
        {W: (np.int8, (4, 128)), **PAIR},
        {W: (np.int8, (2, 128)), **PAIR, "scale_bias": (F32, (4, 1))},
    ),
    "w4a8_dynamic_g64": (
        {W: (np.int8, (4, 128)), **PAIR, **SECOND, "weight_offset_second": (np.int64, (4, 2))},
        {
            W: (np.int8, (2, 128)),
            **PAIR,
            **SECOND,
            "weight_offset_second": (F32, (4, 2)),
            "scale_bias": (F32, (4, 1)),
        },
    ),
    "w4a4_dynamic": ({W: (np.int8, (4, 128)), **PAIR},) * 2,
    "w4a4_flatquant_dynamic": (
        {
            W: (np.int8, (4, 128)),
            **PAIR,
            "left_trans": (F32, (8, 8)),
            "right_trans": (F32, (16, 16)),
            "clip_ratio": (F32, (1,)),
        },
    )
    * 2,
    "w8a8_mix": ({W: (np.int8, (4, 128)), **PAIR, **STATIC},) * 2,
    "w8a8s": ({W: (np.int8, (4, 128)), **STATIC},) * 2,
    "nf4": (
        {W: (np.uint8, (256,)), "weight_absmax": (F32, (8,)), "weight_shape": (np.int64, (2,))},
    )
    * 2,
    "w8a8fp8_dynamic": ({W: (ml_dtypes.float8_e4m3fn, (4, 128)), **PAIR},) * 2,
    "w4a16_mxfp4": ({W: (np.uint8, (4, 64)), "weight_scale": (np.uint8, (4, 4))},) * 2,
    "w4a4_mxfp4_flatquant": (
        {
            W: (np.uint8, (4, 64)),
            "weight_scale": (np.uint8, (4, 4)),
            "left_trans": (F32, (8, 8)),
            "right_trans": (F32, (16, 16)),
            "clip_ratio": (F32, (1,)),
        },
    )
    * 2,
    "w8a8_mxfp8": ({W: (ml_dtypes.float8_e4m3fn, (4, 128)), "weight_scale": (np.uint8, (4, 4))},)
    * 2,
    "w4a8_mxfp": ({W: (np.uint8, (4, 64)), "weight_scale": (np.uint8, (4, 4))},) * 2,
    "w4a4_mxfp4": ({W: (np.uint8, (4, 64)), "weight_scale": (np.uint8, (4, 4))},) * 2,
}


@pytest.mark.parametrize("text", EXPECTED)
def test_dtypes_and_shapes(text: str) -> None:
    one = layer(text)
    for form, expected in zip((PLAIN, V1), EXPECTED[text], strict=True):
        tensors = form.encode(one)
        bias = tensors.pop("bias")
        assert (bias.dtype, bias.shape) == (np.float16, (4,))
        found = {key: (array.dtype, array.shape) for key, array in tensors.items()}
        assert found == {key: (np.dtype(kind), size) for key, (kind, size) in expected.items()}
        nbytes = sum(array.nbytes for array in tensors.values())
        assert form.nbytes(one.name, one.scheme, (4, 128), "float16") == nbytes


@both
@pytest.mark.parametrize(
    "text", [*TYPES, "w4a16_asym", "w4a16_g32_asym", "nf4_b128", "w8a8s_tensor"]
)
@pytest.mark.parametrize("model_dtype", ["float16", "bfloat16", "float32"])
def test_round_trip(form: Format, text: str, model_dtype: str) -> None:
    one = layer(text, (4, 256), model_dtype=model_dtype)
    tensors = form.encode(one)
    kind = form.type_name(one.scheme.ascend_type)
    scheme = scheme_of(one.name, kind, tensors)
    assert str(scheme) == ("w8a8" if (text, form) == ("w8a8_mix", PLAIN) else text)
    back = form.decode(one.name, scheme, tensors, model_dtype)
    assert back.extras.keys() == one.extras.keys()
    for key, array in one.extras.items():
        np.testing.assert_array_equal(back.extras[key], array)
    assert back.codes.dtype == np.int8
    np.testing.assert_array_equal(back.codes, one.codes)
    np.testing.assert_array_equal(back.weight_offset, one.weight_offset)
    again = form.encode(back)
    assert {key: array.tobytes() for key, array in again.items()} == {
        key: array.tobytes() for key, array in tensors.items()
    }
    if one.scheme.variant is Variant.SPARSE:  # the scale is found again to the last place or so
        np.testing.assert_allclose(back.weight_scale, one.weight_scale, rtol=1e-6)
    else:
        np.testing.assert_array_equal(back.dequantized(), one.dequantized())


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["w4a16", "w4a16_g4", "w4a8_dynamic", "w4a8_dynamic_g4", "nf4_b8", "w8a8s"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from([V1, PLAIN]),
)
def test_any_shape_comes_back(
    text: str, half_rows: int, sixteenths: int, seed: int, form: Format
) -> None:
    one = layer(text, (2 * half_rows, 16 * sixteenths), seed=seed)
    tensors = form.encode(one)
    back = form.decode(
        one.name, scheme_of("a", one.scheme.ascend_type, tensors), tensors, "float16"
    )
    assert back.scheme.weight is not None
    np.testing.assert_array_equal(back.codes, one.codes)
    np.testing.assert_allclose(back.dequantized(), one.dequantized(), rtol=1e-6)


# --- the order of nibbles -------------------------------------------------------------------------


def test_w4a16_per_channel_packs_neighbours_in_a_row() -> None:
    one = layer("w4a16")
    stored = V1.encode(one)["weight"]
    for row in range(4):
        for column in range(64):
            byte = int(stored[row, column]) & 255
            low, high = int(one.codes[row, 2 * column]), int(one.codes[row, 2 * column + 1])
            assert byte == (low & 15) + ((high & 15) << 4)


def test_a_group_that_is_the_row_is_packed_as_per_channel_which_readers_take_it_for() -> None:
    one = layer("w4a16_g128")
    tensors = V1.encode(one)
    assert tensors["weight"].shape == (4, 64)
    assert tensors["weight"].tobytes() == V1.encode(layer("w4a16"))["weight"].tobytes()
    for scheme in (one.scheme, scheme_of("a", "W4A16", tensors)):
        np.testing.assert_array_equal(V1.decode("a", scheme, tensors, "float16").codes, one.codes)


@both
def test_two_stages_with_one_group_in_a_row_stay_two_stages(form: Format) -> None:
    one = layer("w4a8_dynamic_g128")
    tensors = form.encode(one)
    scheme = scheme_of("a", "W4A8_DYNAMIC", tensors)
    assert str(scheme) == "w4a8_dynamic_g128"
    back = form.decode("a", scheme, tensors, "float16")
    np.testing.assert_array_equal(back.dequantized(), one.dequantized())


@pytest.mark.parametrize("text", ["w4a16_g32", "w4a8_dynamic", "w4a8_dynamic_g32"])
def test_grouped_and_two_stage_weights_pack_neighbours_in_a_column(text: str) -> None:
    one = layer(text)
    stored = V1.encode(one)["weight"]
    for row in range(2):
        for column in range(128):
            byte = int(stored[row, column]) & 255
            low, high = int(one.codes[2 * row, column]), int(one.codes[2 * row + 1, column])
            assert byte == (low & 15) + ((high & 15) << 4)


@both
def test_nf4_has_the_even_element_in_the_high_nibble(form: Format) -> None:
    one = layer("nf4", (3, 128))
    tensors = form.encode(one)
    assert tensors["weight_shape"].tolist() == [3, 128]
    flat = one.codes.ravel().tolist()
    pairs = nibbles(tensors["weight"])
    assert pairs[:, 1].tolist() == flat[0::2]
    assert pairs[:, 0].tolist() == flat[1::2]
    values = np.array(NF4.levels)[one.codes.reshape(-1, 64)] * tensors["weight_absmax"][:, None]
    np.testing.assert_allclose(one.dequantized().ravel(), values.ravel(), rtol=1e-6)


@both
@pytest.mark.parametrize("text", ["w4a8_mxfp", "w4a4_mxfp4", "w4a16_mxfp4", "w4a4_mxfp4_flatquant"])
def test_fp4_has_the_even_column_in_the_low_nibble(form: Format, text: str) -> None:
    one = layer(text)
    tensors = form.encode(one)
    pairs = nibbles(tensors["weight"]).reshape(4, 128)
    levels = np.array([*FP4.levels, *(-level for level in FP4.levels)])
    scale = 2.0 ** (tensors["weight_scale"].astype(int) - 127)
    np.testing.assert_array_equal(levels[pairs] * np.repeat(scale, 32, axis=1), one.multiplied())


def test_fp8_is_stored_as_itself() -> None:
    one = layer("w8a8_mxfp8")
    tensors = V1.encode(one)
    scale = 2.0 ** (tensors["weight_scale"].astype(int) - 127)
    values = tensors["weight"].astype(F32) * np.repeat(scale, 32, axis=1)
    np.testing.assert_array_equal(values, one.dequantized())


def test_fp8_per_channel_has_a_float_scale_of_its_largest_level() -> None:
    one = layer("w8a8fp8_dynamic")
    tensors = V1.encode(one)
    weight = np.random.default_rng(0).standard_normal((4, 128)).astype(F32)
    peaks = np.abs(weight).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(tensors["weight_scale"], peaks / F32(448))
    assert not tensors["weight_offset"].any()
    rounded = (weight / tensors["weight_scale"]).astype(ml_dtypes.float8_e4m3fn)
    assert tensors["weight"].tobytes() == rounded.tobytes()
    np.testing.assert_array_equal(one.dequantized(), rounded.astype(F32) * tensors["weight_scale"])


# --- what belongs to single types -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("a.q_proj", 1),
        ("a.gate_proj", 1),
        ("a.w3", 1),
        ("a.dense", 1),
        ("a.o_proj", 16),
        ("a.down_proj", 16),
        ("a.experts.3.w2", 16),
    ],
)
@pytest.mark.parametrize("text", ["w4a8_dynamic", "w4a8_dynamic_g32"])
def test_scale_bias(text: str, name: str, slices: int) -> None:
    one = layer(text, name=name)
    found = V1.encode(one)["scale_bias"]
    second = one.extras.get(SECOND_SCALE, np.ones((4, 1), F32))
    weight = one.codes * np.repeat(second, 128 // second.shape[1], axis=1) * one.weight_scale
    width = 128 // slices
    sums = [[8 * row[i * width : i * width + width].sum() for i in range(slices)] for row in weight]
    np.testing.assert_allclose(found, sums, rtol=1e-5, atol=1e-6)
    assert "scale_bias" not in PLAIN.encode(one)


def test_mixed_activations_are_named_in_one_layout_only() -> None:
    one = layer("w8a8_mix")
    assert set(V1.entries(one, V1.encode(one)).values()) == {"W8A8_MIX", "FLOAT"}
    assert set(PLAIN.entries(one, PLAIN.encode(one)).values()) == {"W8A8", "FLOAT"}
    assert V1.weight_file("W8A8_MIX") == "quant_model_weight_w8a8_mix"
    assert PLAIN.weight_file("W8A8_MIX") == "quant_model_weight_w8a8"
    assert PLAIN.description_file("W8A8_MIX") == "quant_model_description_w8a8.json"
    assert PLAIN.description("W8A8_MIX", 0) == {"model_quant_type": "W8A8"}
    plain = PLAIN.encode(layer("w8a8"))
    for key, array in PLAIN.encode(one).items():
        np.testing.assert_array_equal(array, plain[key])


def test_flatquant_stands_for_the_weight_before_the_transform() -> None:
    one = layer("w4a4_flatquant_dynamic")
    full = np.kron(one.extras["left_trans"], one.extras["right_trans"])
    inside = one.codes * one.weight_scale
    np.testing.assert_allclose(one.multiplied(), inside)
    np.testing.assert_allclose(one.dequantized(), inside @ full.T, rtol=1e-4, atol=1e-4)


def test_the_version_tells_the_layout() -> None:
    assert format_of({"version": "1.0.0"}) is V1
    assert format_of({"version": "0.0.0"}) is PLAIN
    assert format_of({}) is PLAIN


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "form", "reason"),
    [
        ("w4a16", (3, 16), V1, None),
        (
            "w4a16",
            (4, 15),
            V1,
            "pairs of its 15 input channels share a byte, and the number",
        ),
        ("w4a16", (4, 15), PLAIN, None),
        ("w4a16_g8", (3, 16), V1, "pairs of its 3 output channels share a byte, and the number is"),
        ("w4a16_g8", (3, 16), PLAIN, None),
        ("w4a16_g8", (4, 20), PLAIN, "group size 8 does not divide its 20 input channels"),
        ("w4a8_dynamic", (3, 16), V1, "pairs of its 3 output channels"),
        ("w4a8_dynamic", (4, 24), V1, "its 24 input channels are no multiple of 16, as scale_bias"),
        ("w4a8_dynamic_g8", (4, 20), V1, "group size 8 does not divide its 20"),
        ("w4a4_dynamic", (4, 20), V1, "engines pack 8 codes in a word, and its 20 input channels"),
        ("w4a4_flatquant_dynamic", (4, 20), PLAIN, "engines pack 8 codes in a word"),
        ("nf4", (3, 32), V1, "block size 64 does not divide its 96 elements"),
        ("nf4", (4, 48), V1, None),
        ("nf4_b3", (3, 3), V1, "pairs of elements share a byte, and their number is odd"),
        ("w8a8_mxfp8", (4, 96), V1, "engines read scales in pairs, and it has 3 groups in a row"),
        ("w4a4_mxfp4", (4, 48), V1, "group size 32 does not divide its 48 input channels"),
    ],
)
def test_shapes_that_do_not_fit(
    text: str, shape: tuple[int, int], form: Format, reason: str | None
) -> None:
    found = form.unsupported(QuantScheme.parse(text), shape)
    assert (found is None) if reason is None else (found or "").startswith(reason)


def test_a_layer_that_does_not_fit_is_not_encoded() -> None:
    one = layer("w4a16_g8", (3, 16), name="x.up")
    with pytest.raises(FormatError, match=r"x\.up cannot be w4a16_g8: pairs of its 3 output"):
        V1.encode(one)
    PLAIN.encode(one)


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        ("nf4", {"weight_shape": None}, "x.weight_shape must be there and the shape of the weight"),
        ("nf4", {"weight_shape": np.array([4, 64])}, "x.weight_shape must be there and the shape"),
        (
            "nf4",
            {"weight_absmax": np.ones(3, F32)},
            "x cannot be nf4_b170: block size 170",
        ),
        ("w8a8_mxfp8", {"weight_scale": np.ones((4, 4), F32)}, "x.weight_scale must be uint8"),
        ("w4a8_dynamic_g32", {"scale_bias": None}, "x has no scale_bias"),
        (
            "w4a4_flatquant_dynamic",
            {"left_trans": np.eye(4, dtype=F32)},
            r"must have shape \(8, 8\)",
        ),
        ("w4a4_flatquant_dynamic", {"clip_ratio": None}, "x has no clip_ratio"),
        ("w8a8s", {"deq_scale": None}, "x has no deq_scale of one or two dimensions"),
    ],
)
def test_damaged_layers_are_named(text: str, change: dict[str, Any], message: str) -> None:
    one = layer(text)
    tensors = {key: array for key, array in (V1.encode(one) | change).items() if array is not None}
    with pytest.raises(FormatError, match=message):
        V1.decode("x", scheme_of("x", one.scheme.ascend_type, tensors), tensors, "float16")

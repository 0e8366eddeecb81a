import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim_core.dtypes import INT4, INT8, IntType
from slim_core.errors import InvalidTypeError, InvalidValueError
from slim_core.scheme import (
    FLOAT,
    KNOWN_SCHEMES,
    TYPE_PRIORITY,
    Granularity,
    QuantScheme,
    TensorScheme,
    Variant,
    model_type,
)

PER_CHANNEL = TensorScheme(INT8, Granularity.PER_CHANNEL)
STATIC = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)
PER_TOKEN = TensorScheme(INT8, Granularity.PER_TOKEN)
VARIANTS = {"W8A8S": Variant.SPARSE}


@pytest.mark.parametrize(
    ("text", "weight", "activation", "ascend"),
    [
        ("w8a8", PER_CHANNEL, STATIC, "W8A8"),
        ("w8a8_tensor", TensorScheme(INT8, Granularity.PER_TENSOR), STATIC, "W8A8"),
        ("w8a8_dynamic", PER_CHANNEL, PER_TOKEN, "W8A8_DYNAMIC"),
        ("w8a16", PER_CHANNEL, None, "W8A16"),
        ("w8a16_asym", TensorScheme(INT8, Granularity.PER_CHANNEL, False), None, "W8A16"),
        ("w8a16_g128", TensorScheme(INT8, Granularity.PER_GROUP, True, 128), None, "W8A16"),
        ("w8a16_g64_asym", TensorScheme(INT8, Granularity.PER_GROUP, False, 64), None, "W8A16"),
        ("float", None, None, "FLOAT"),
        ("w8a8s", PER_CHANNEL, STATIC, "W8A8S"),
        ("w8a8s_tensor", TensorScheme(INT8, Granularity.PER_TENSOR), STATIC, "W8A8S"),
    ],
)
def test_parse(text, weight, activation, ascend):
    scheme = QuantScheme.parse(text)
    assert scheme == QuantScheme(weight, activation, VARIANTS.get(ascend, Variant.NONE))
    assert scheme.ascend_type == ascend
    assert str(scheme) == text
    assert QuantScheme.parse(text.upper()) == scheme


@pytest.mark.parametrize(
    ("text", "ascend", "weight", "activation", "group"),
    [
        ("w8a8_mix", "W8A8_MIX", "int8 per_channel", "int8 per_tensor", 0),
        ("w4a16", "W4A16", "int4 per_channel", None, 0),
        ("w4a16_g128_asym", "W4A16", "int4 per_group", None, 128),
        ("w4a8_dynamic", "W4A8_DYNAMIC", "int4 per_channel", "int8 per_token", 0),
        ("w4a8_dynamic_g32", "W4A8_DYNAMIC", "int4 per_group", "int8 per_token", 32),
        ("w4a4_dynamic", "W4A4_DYNAMIC", "int4 per_channel", "int4 per_token", 0),
        (
            "w4a4_flatquant_dynamic",
            "W4A4_FLATQUANT_DYNAMIC",
            "int4 per_channel",
            "int4 per_token",
            0,
        ),
        ("nf4", "NF4", "nf4 per_block", None, 0),
        ("nf4_b128", "NF4", "nf4 per_block", None, 0),
        ("w8a8fp8_dynamic", "W8A8FP8_DYNAMIC", "fp8_e4m3 per_channel", "fp8_e4m3 per_token", 0),
        ("w4a16_mxfp4", "W4A16_MXFP4", "fp4_e2m1 per_group", None, 32),
        (
            "w4a4_mxfp4_flatquant",
            "W4A4_MXFP4_FLATQUANT",
            "fp4_e2m1 per_group",
            "fp4_e2m1 per_group",
            32,
        ),
        ("w8a8_mxfp8", "W8A8_MXFP8", "fp8_e4m3 per_group", "fp8_e4m3 per_group", 32),
        ("w4a8_mxfp", "W4A8_MXFP", "fp4_e2m1 per_group", "fp8_e4m3 per_group", 32),
        ("w4a4_mxfp4", "W4A4_MXFP4", "fp4_e2m1 per_group", "fp4_e2m1 per_group", 32),
    ],
)
def test_low_bit_types(text, ascend, weight, activation, group):
    scheme = QuantScheme.parse(text)
    assert scheme.ascend_type == ascend
    assert str(scheme) == text
    assert scheme.group_size == group
    found = [
        tensor and f"{tensor.dtype} {tensor.granularity.value}"
        for tensor in (scheme.weight, scheme.activation)
    ]
    assert found == [weight, activation]


def test_blocks_of_64_need_not_be_named():
    assert QuantScheme.parse("nf4_b64") == QuantScheme.parse("nf4")


@pytest.mark.parametrize(
    "text",
    [
        "nf4_g64",
        "nf4_asym",
        "w4a8_dynamic_asym",
        "w4a4_dynamic_g32",
        "w4a4_mxfp4_g32",
        "w8a8s_asym",
    ],
)
def test_what_a_type_cannot_be(text):
    assert parsed_name(text) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("w4a4_mxfp4_dualscale", "no engine reads it; w4a4_mxfp4 has"),
        ("W4A4_MXFP4_SVD", "no engine reads it"),
        ("w8a8_timestep", "diffusion models"),
        ("w8a8sc", "quantize to w8a8s"),
        ("w16a16s", "stay in floating point"),
        ("w16a16sc", "stay in floating point"),
        ("wfp8afp8_dynamic", "use w8a8fp8_dynamic"),
    ],
)
def test_types_that_are_known_and_not_made(text, says):
    with pytest.raises(InvalidValueError, match=f"cannot be made: .*{says}"):
        QuantScheme.parse(text)
    assert text.upper() not in TYPE_PRIORITY


def test_every_known_scheme_parses_to_itself():
    for text in KNOWN_SCHEMES:
        assert str(QuantScheme.parse(text)) == text


@given(
    st.builds(
        "w{}a{}{}{}{}".format,
        st.sampled_from([2, 4, 8]),
        st.sampled_from([8, 16]),
        st.sampled_from(["", "_dynamic"]),
        st.one_of(st.sampled_from(["", "_tensor"]), st.integers(1, 4096).map("_g{}".format)),
        st.sampled_from(["", "_asym"]),
    )
)
def test_what_parses_is_written_back_as_it_was(text):
    assert parsed_name(text) in (None, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w8",
        "w8a8 ",
        "w08a8",
        "w8a16_g0",
        "w8a16_g0128",
        "w8a16_dynamic",
        "w8a8_g128",
        "w8a8_asym",
        "w16a16",
        "w1a16",
        "w9a8",
        "w8a7",
        "w8a8_dynamic_dynamic",
        "w8a16_g128_tensor",
        "w\N{ARABIC-INDIC DIGIT EIGHT}a8",
        "w8a" + "9" * 5000,
    ],
)
def test_what_is_no_scheme(text):
    with pytest.raises(InvalidValueError, match="known are w8a8, w8a8_dynamic, w8a16"):
        QuantScheme.parse(text)


def parsed_name(text):
    try:
        return str(QuantScheme.parse(text))
    except InvalidValueError:
        return None


@given(st.text(max_size=20))
def test_any_text_parses_to_itself_or_is_a_typed_error(text):
    assert parsed_name(text) in (None, text.lower())


def test_near_misses_are_offered():
    with pytest.raises(InvalidValueError, match="scheme 'w8a8_dynamik' is unknown") as caught:
        QuantScheme.parse("w8a8_dynamik")
    assert "'w8a8_dynamic'" in caught.value.hint


@pytest.mark.parametrize("value", [8, None, b"w8a8", ["w8a8"]])
def test_schemes_are_text(value):
    with pytest.raises(InvalidTypeError, match="scheme must be str, not"):
        QuantScheme.parse(value)


def test_properties():
    static, dynamic = QuantScheme.parse("w8a8"), QuantScheme.parse("w8a8_dynamic")
    grouped = QuantScheme.parse("w8a16_g32")
    table = [(s.is_float, s.is_static, s.is_dynamic, s.group_size) for s in (static, dynamic)]
    assert table == [(False, True, False, 0), (False, False, True, 0)]
    assert (grouped.is_static, grouped.is_dynamic, grouped.group_size) == (False, False, 32)
    assert (FLOAT.is_float, FLOAT.is_static, FLOAT.is_dynamic, FLOAT.group_size) == (
        True,
        False,
        False,
        0,
    )


@pytest.mark.parametrize(
    ("granularity", "size"),
    [(Granularity.PER_GROUP, 0), (Granularity.PER_CHANNEL, 128), (Granularity.PER_GROUP, -1)],
)
def test_group_size_goes_with_groups(granularity, size):
    with pytest.raises(InvalidValueError, match="group_size must be"):
        TensorScheme(INT8, granularity, True, size)


def test_schemes_without_ascend_type_say_so():
    with pytest.raises(InvalidValueError, match="scheme w3a8 has no Ascend type"):
        _ = QuantScheme(TensorScheme(IntType(3), Granularity.PER_CHANNEL), STATIC).ascend_type


def test_schemes_are_values():
    assert len({QuantScheme.parse("w8a8"), QuantScheme.parse("w8a8"), FLOAT}) == 2
    assert TensorScheme(INT4, Granularity.PER_CHANNEL) != PER_CHANNEL


def test_model_type_is_the_one_of_highest_priority():
    assert {QuantScheme.parse(text).ascend_type for text in KNOWN_SCHEMES} == set(TYPE_PRIORITY)
    assert model_type(set()) == "FLOAT"
    assert model_type({"FLOAT", "W8A16"}) == "W8A16"
    assert model_type({"W8A8_DYNAMIC", "W8A16", "FLOAT"}) == "W8A8_DYNAMIC"
    assert model_type({"W8A8_DYNAMIC", "W8A8"}) == "W8A8"

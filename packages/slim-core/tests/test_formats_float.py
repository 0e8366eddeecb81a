import ml_dtypes
import numpy as np
import pytest

from slim_core.errors import FormatError
from slim_core.formats import FORMATS
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme

FORM = FORMATS["float"]


def layer(model_dtype, bias=None):
    return QuantizedLinear(
        "a",
        QuantScheme.parse("w8a16_asym"),
        np.array([[-128, 0, 127], [5, 6, 7]], np.int8),
        np.array([[0.1], [1.0]], np.float32),
        np.array([[-28.0], [6.0]], np.float32),
        bias=bias,
        model_dtype=model_dtype,
    )


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_weight_in_the_dtype_of_the_model(name):
    tensors = FORM.encode(layer(name))
    assert list(tensors) == ["weight"]
    weight = tensors["weight"]
    assert weight.dtype == np.dtype(name)
    exact = np.float32([[-100, 28, 155], [-1, 0, 1]]) * np.float32([[0.1], [1.0]])
    np.testing.assert_array_equal(weight, exact.astype(name))


def test_bias_goes_along_unchanged():
    bias = np.array([1.5, -2.5], ml_dtypes.bfloat16)
    assert FORM.encode(layer("bfloat16", bias))["bias"] is bias


def test_there_are_no_codes_to_decode():
    one = layer("float32")
    with pytest.raises(FormatError, match="a is stored in floating point and has no codes"):
        FORM.decode("a", one.scheme, FORM.encode(one), "float32")


def test_it_is_an_ordinary_checkpoint():
    assert FORM.weight_file("W8A8") == "model"
    assert FORM.description_file("W8A8") is None
    assert FORM.description("W8A8", 0) == {}
    assert FORM.unsupported(QuantScheme.parse("w8a16_g128"), (3, 5)) is None

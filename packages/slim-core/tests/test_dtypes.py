import ml_dtypes
import numpy as np
import pytest

from slim_core.dtypes import INT4, INT8, IntType, float_name
from slim_core.errors import InvalidTypeError, InvalidValueError


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)]
)
def test_range_of_two_complement(bits, low, high):
    kind = IntType(bits)
    assert (kind.min, kind.max, str(kind)) == (low, high, f"int{bits}")


def test_named_types():
    assert IntType(4) == INT4
    assert IntType(8) == INT8
    assert INT8.min == np.iinfo(np.int8).min


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 16])
def test_bits_out_of_range(bits):
    with pytest.raises(InvalidValueError, match=rf"bits must be in \[2, 8\], not {bits}"):
        IntType(bits)


@pytest.mark.parametrize("bits", [8.0, "8", True, None])
def test_bits_of_wrong_type(bits):
    with pytest.raises(InvalidTypeError, match="bits must be int, not"):
        IntType(bits)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("torch.bfloat16", "bfloat16"),
        ("float16", "float16"),
        (np.dtype(np.float32), "float32"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
    ],
)
def test_float_name(dtype, name):
    assert float_name(dtype) == name


def test_float_name_offers_the_nearest():
    with pytest.raises(InvalidValueError, match="not 'float61'") as caught:
        float_name("torch.float61")
    assert "'float16'" in caught.value.hint
    with pytest.raises(InvalidValueError, match="dtype must be one of 'float32'"):
        float_name(np.dtype(np.int8))

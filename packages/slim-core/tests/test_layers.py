import ml_dtypes
import numpy as np

from slim_core.layers import QuantizedLinear
from slim_core.numerics import fold_static
from slim_core.scheme import QuantScheme

F32 = np.float32


def static_layer(bias=None):
    codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    scale = F32([[0.5], [0.25], [2.0]])
    return QuantizedLinear(
        "a.q_proj",
        QuantScheme.parse("w8a8"),
        codes,
        scale,
        np.zeros_like(scale),
        F32([0.125]),
        F32([-4.0]),
        bias=bias,
        model_dtype="bfloat16",
    )


def test_dequantized_is_codes_times_scale():
    layer = static_layer()
    np.testing.assert_array_equal(layer.dequantized(), layer.codes * layer.weight_scale)
    assert layer.dequantized().dtype == F32


def test_folding_takes_the_bias_in_the_dtype_of_the_model():
    bias = np.array([1.5, -3.0, 0.1], ml_dtypes.bfloat16)
    layer = static_layer(bias)
    deq_scale, quant_bias = layer.folded()
    assert deq_scale.tolist() == [0.0625, 0.03125, 0.25]
    wanted = fold_static(
        layer.codes, layer.weight_scale, layer.input_scale, layer.input_offset, bias.astype(F32)
    )
    np.testing.assert_array_equal(quant_bias, wanted[1])
    # row sums are -18, -2, 14; the bias of the first row is 1.5 / 0.0625 = 24
    assert quant_bias.tolist() == [4 * -18 + 24, 4 * -2 - 96, 4 * 14]


def test_renamed_shares_everything_else():
    layer = static_layer()
    other = layer.renamed("b.q_proj")
    assert (layer.name, other.name) == ("a.q_proj", "b.q_proj")
    assert other.codes is layer.codes
    assert other.scheme is layer.scheme

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from slim_core.dtypes import INT4, INT8
from slim_core.numerics import quantize_per_token
from slim_core.scheme import Granularity, TensorScheme
from slim_mindspore.cells import quant_cell
from slim_mindspore.linears import cell_at, find_linears, replace_cell
from slim_mindspore.quantized_layer import SmoothedLinear

STATIC = TensorScheme(INT8, Granularity.PER_TENSOR, symmetric=False)
TOKEN = TensorScheme(INT8, Granularity.PER_TOKEN)


@pytest.mark.parametrize("columns", [64, 1024, 3000])
def test_static_sums_are_exact(make_layer, columns):
    layer = make_layer(columns, STATIC, extreme=True)
    x = np.where(layer.codes[0] > 0, 2.4, -2.6).astype(np.float32)[None]
    found = quant_cell(SmoothedLinear(layer))(ms.Tensor(x)).asnumpy()
    codes = np.clip(np.rint(x / np.float32(0.02) - 5), -128, 127).astype(np.int64)
    deq_scale, quant_bias = layer.folded()
    total = codes @ layer.codes.astype(np.int64).T + quant_bias
    np.testing.assert_array_equal(found, total.astype(np.float32) * deq_scale)


@pytest.mark.parametrize("columns", [64, 3000])
def test_dynamic_sums_are_exact(make_layer, columns):
    layer = make_layer(columns, TOKEN)
    x = np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32)
    found = quant_cell(SmoothedLinear(layer))(ms.Tensor(x)).asnumpy()
    codes, scale = quantize_per_token(x, INT8)
    total = codes.astype(np.int64) @ layer.codes.astype(np.int64).T
    expected = total.astype(np.float32) * scale * layer.weight_scale[:, 0] + layer.bias
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme(INT8, Granularity.PER_CHANNEL),
        TensorScheme(INT8, Granularity.PER_TENSOR),
        TensorScheme(INT4, Granularity.PER_GROUP, group_size=16),
        TensorScheme(INT4, Granularity.PER_GROUP, symmetric=False, group_size=32),
    ],
)
def test_weight_only(make_layer, scheme):
    layer = make_layer(64, weight=scheme)
    smooth = np.random.default_rng(2).uniform(0.5, 2, 64).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)
    found = quant_cell(SmoothedLinear(layer, smooth), nn.ReLU())(ms.Tensor(x)).asnumpy()
    expected = np.maximum((x / smooth) @ layer.dequantized().T + layer.bias, 0)
    assert np.abs(found - expected).max() <= 1e-5


def test_replacing_in_any_container(make_layer):
    network = nn.SequentialCell([nn.Dense(4, 4), nn.CellList([nn.Dense(4, 4)]), nn.ReLU()])
    assert list(find_linears(network)) == ["0", "1.0"]
    for name in ("0", "1.0"):
        replace_cell(network, name, quant_cell(SmoothedLinear(make_layer(64))))
        assert cell_at(network, name).scheme_name == "w8a16"
    names = [parameter.name for parameter in network.get_parameters()]
    assert "1.0._layer.matmul.weight_scale" in names
    assert not find_linears(network)
    assert network[0].scheme_name == "w8a16"
    with pytest.raises(ValueError, match=r"the network has no cell '2\.x'"):
        replace_cell(network, "2.x", nn.ReLU())

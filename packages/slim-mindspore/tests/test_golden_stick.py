"""Against mindspore-gs itself, where an environment has it.

mindspore-gs pins a MindSpore of its own and imports mindformers.  An environment for this file and
``test_mindformers.py``:
``pip install mindspore==2.7.1.post1 mindformers==1.7.0 tqdm prettytable matplotlib``, then
``pip install --no-deps mindspore-gs==1.2.0``, then this package and what it needs.
"""

import importlib.util

import mindspore as ms
import numpy as np
import pytest

from slim_core.dtypes import INT4, INT8
from slim_core.formats import encode_deq_scale
from slim_core.packing import pack_int4
from slim_core.scheme import Granularity, TensorScheme
from slim_mindspore.methods.rounding import round_to_nearest
from slim_mindspore.tensors import parameters_of

pytestmark = pytest.mark.oracle

CHANNEL8 = TensorScheme(INT8, Granularity.PER_CHANNEL)
CHANNEL4 = TensorScheme(INT4, Granularity.PER_CHANNEL)
GROUP4 = TensorScheme(INT4, Granularity.PER_GROUP, group_size=64)
ASYM4 = TensorScheme(INT4, Granularity.PER_GROUP, symmetric=False, group_size=64)


@pytest.fixture(scope="module")
def golden_stick():
    if importlib.util.find_spec("mindspore_gs") is None:
        pytest.skip("mindspore-gs is not installed; it pins a MindSpore of its own")
    return importlib.import_module("mindspore_gs.ptq.basic_quant_func")


@pytest.fixture(scope="module")
def weight(shared_model):
    return parameters_of(shared_model)["model.layers.0.attention.wq.weight"]


@pytest.mark.parametrize("scheme", [CHANNEL8, CHANNEL4, GROUP4, ASYM4])
def test_rounding(golden_stick, weight, scheme):
    grouped = scheme.group_size > 0
    scale, zero, codes = golden_stick.quant_tensor(
        ms.Tensor(weight),
        ms.ops.min,
        ms.ops.max,
        narrow_range=False,
        symmetric=scheme.symmetric,
        need_group=grouped,
        group_size=scheme.group_size,
        quant_dtype=ms.int8 if scheme.dtype == INT8 else ms.qint4x2,
        quant_axis=0,
    )
    ours, our_scale, our_offset = round_to_nearest("wq", weight, scheme, "golden_stick")
    # Theirs lie as the layout stores them: (groups, out).
    scale, zero = (
        np.asarray(item.asnumpy(), np.float32).reshape(our_scale.T.shape) for item in (scale, zero)
    )
    np.testing.assert_allclose(our_scale.T, scale, rtol=1e-6)
    np.testing.assert_array_equal(our_offset.T, zero)
    assert np.mean(ours == codes.asnumpy().reshape(ours.shape)) >= 0.9999


def test_packing(golden_stick):
    codes = np.random.default_rng(0).integers(-8, 8, (500, 200)).astype(np.int8)
    theirs = golden_stick.np_int4data_pack_to_int8(codes.copy())
    np.testing.assert_array_equal(np.asarray(pack_int4(codes, axis=1)), theirs)


def test_bits_of_scales(golden_stick):
    scale = np.random.default_rng(0).uniform(1e-6, 1, 1000).astype(np.float32)
    theirs = golden_stick.convert_fp32_to_int64(scale)
    np.testing.assert_array_equal(encode_deq_scale(scale, "float32"), theirs)

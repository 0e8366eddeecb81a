"""On a Llama of mindformers itself, where an environment has it (see ``test_golden_stick.py``)."""

import importlib.util

import mindspore as ms
import numpy as np
import pytest

from slim_mindspore import (
    Calibrator,
    Decompose,
    QuantConfig,
    QuantizationConfig,
    count_parameters,
    quantize_network,
)
from slim_mindspore.ckpt import read_ckpt
from slim_mindspore.evaluate import relative_error
from slim_mindspore.linears import find_linears, set_weight, weight_of

pytestmark = pytest.mark.oracle

SIZES = {
    "seq_length": 32,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "intermediate_size": 176,
    "multiple_of": 16,
}
ON_CPU = {  # what has no kernel on a CPU, off
    "use_past": False,
    "use_flash_attention": False,
    "fused_rms_norm": False,
    "use_rope_slice": True,
    "checkpoint_name_or_path": "",
}
FLOAT32 = dict.fromkeys(
    (
        "compute_dtype",
        "param_init_type",
        "layernorm_compute_type",
        "softmax_compute_type",
        "rotary_dtype",
    ),
    "float32",
)


@pytest.fixture(scope="module")
def make():
    if importlib.util.find_spec("mindformers") is None:
        pytest.skip("mindformers is not installed; it pins a MindSpore of its own")
    llama = importlib.import_module("mindformers.models.llama")

    def build():
        ms.set_seed(1)
        network = llama.LlamaForCausalLM(
            llama.LlamaConfig(batch_size=1, **SIZES, **ON_CPU, **FLOAT32)
        )
        network.set_train(False)
        return network

    return build


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(1, 96, (1, 32)).astype(np.int32)


def logits_of(network, ids):
    return network(ms.Tensor(ids))[0].asnumpy()


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"quant_method": "rtn"}, 0.005),
        ({"quant_method": "ptq", "activation_dtype": "int8"}, 0.03),
        (
            {
                "quant_method": "smooth_quant",
                "activation_dtype": "int8",
                "outliers_suppression": "smooth",
            },
            0.03,
        ),
    ],
)
def test_quantizing(make, ids, options, bound):
    network = make()
    exact = logits_of(network, ids)
    config = QuantizationConfig.build(
        weight_dtype="int8", modules_to_not_convert=["lm_head"], **options
    )
    assert len(quantize_network(network, config, [ids]).layers) == 14
    assert 0 < relative_error(logits_of(network, ids), exact) <= bound


def test_sparse(make, ids, tmp_path):
    network, path = make(), tmp_path / "model.ckpt"
    exact = logits_of(network, ids)
    ms.save_checkpoint(network, str(path))
    calibrator = Calibrator(
        QuantConfig([], 0.03),
        network,
        str(path),
        [[ids]],
        forward_fn=lambda model, sample: model(ms.Tensor(sample[0])),
    )
    calibrator.run()
    calibrator.save(str(tmp_path / "quant.ckpt"))
    saved = read_ckpt(tmp_path / "quant.ckpt")
    assert sum(name.endswith(".deq_scale") for name in saved) == 14
    error = relative_error(logits_of(calibrator.fake_quantize_model(), ids), exact)
    assert 0 < error <= 0.1


def test_low_rank(make, ids):
    """Weights of rank 16 lose nothing at rank 16."""
    network, random = make(), np.random.default_rng(1)
    linears = {name: c for name, c in find_linears(network).items() if "feed_forward" in name}
    assert {type(cell).__name__ for cell in linears.values()} == {"Linear"}
    for cell in linears.values():
        rows, columns = weight_of(cell).shape
        left, right = random.standard_normal((rows, 16)), random.standard_normal((16, columns))
        set_weight(cell, (left @ right / columns).astype(np.float32))
    exact = logits_of(network, ids)
    before = count_parameters(network)
    network = Decompose(network).from_dict({"feed_forward": 16}, divisor=1).decompose_network()
    assert count_parameters(network) < before
    assert relative_error(logits_of(network, ids), exact) <= 1e-5

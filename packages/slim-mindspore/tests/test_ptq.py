"""The interface of Golden Stick: configurations, apply and convert."""

from collections import OrderedDict

import mindspore as ms
import numpy as np
import pytest

from slim_core.errors import InvalidTypeError, InvalidValueError, PlanError, RecipeError
from slim_mindspore import load_llama
from slim_mindspore.ckpt import CkptFile
from slim_mindspore.evaluate import relative_error
from slim_mindspore.ptq import (
    PTQ,
    AWQConfig,
    BackendTarget,
    GPTQQuantConfig,
    NetworkHelper,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
    RoundToNearest,
    SmoothQuant,
    SmoothQuantConfig,
)

HEAD = ["lm_head"]
W8A8 = {"weight_quant_dtype": ms.int8, "act_quant_dtype": ms.int8}
SMOOTH = OutliersSuppressionType.SMOOTH
TOKEN = {"act_quant_granularity": QuantGranularity.PER_TOKEN}


@pytest.fixture(scope="module")
def ids(eval_ids):
    return ms.Tensor(eval_ids[:128].reshape(1, 128))


@pytest.fixture(scope="module")
def exact(shared_model, ids):
    return shared_model(ids).asnumpy()


CASES = {
    "rtn": (RoundToNearest, {}, "_handler.weight", 0.005),
    "smooth": (SmoothQuant, W8A8 | {"outliers_suppression": SMOOTH}, "_handler.bias", 0.03),
    "ptq": (
        PTQ,
        W8A8 | {"outliers_suppression": SMOOTH, "algo_args": SmoothQuantConfig(alpha=0.6)},
        "_layer.matmul.dequant_scale",
        0.03,
    ),
    "dynamic": (PTQ, W8A8 | TOKEN, "_layer.matmul.weight_scale", 0.02),
}


@pytest.mark.parametrize("case", CASES)
def test_apply_convert_save_deploy(case, tiny_dir, tiny, ids, exact, calib_ids, tmp_path):
    kind, options, key, bound = CASES[case]
    config = PTQConfig(opname_blacklist=[*HEAD, "w2"], **options)
    algorithm = kind(config)
    network = algorithm.apply(tiny, datasets=[{"input_ids": ms.Tensor(x)} for x in calib_ids[:3]])
    assert network is tiny
    network = algorithm.convert(network)
    logits = network(ids).asnumpy()
    assert 0 < relative_error(logits, exact) <= bound
    ms.save_checkpoint(network, str(tmp_path / "q.ckpt"))
    assert f"model.layers.2.attention.wo.{key}" in CkptFile(tmp_path / "q.ckpt").tensors

    config.mode = PTQMode.DEPLOY
    for loads in ("mindspore", "convert"):
        waiting = kind(config).apply(load_llama(tiny_dir))
        if loads == "mindspore":
            loaded = ms.load_checkpoint(str(tmp_path / "q.ckpt"))
            assert ms.load_param_into_net(waiting, loaded) == ([], [])
            np.testing.assert_array_equal(waiting(ids).asnumpy(), logits)
        else:
            waiting = kind(config).convert(waiting, str(tmp_path / "q.ckpt"))
            assert relative_error(waiting(ids).asnumpy(), logits) <= 1e-3


def test_a_cache_and_a_policy(tiny, calib_ids):
    config = PTQConfig(
        weight_quant_dtype=ms.qint4x2,
        weight_quant_granularity=QuantGranularity.PER_GROUP,
        group_size=32,
        kvcache_quant_dtype=ms.int8,
        kvcache_quant_granularity=QuantGranularity.PER_TOKEN,
        opname_blacklist=HEAD,
        precision_recovery=PrecisionRecovery.GPTQ,
        algo_args=GPTQQuantConfig(damp_percent=0.05),
    )
    policies = OrderedDict({r"w2$": PTQConfig(), r"wo$": None})
    algorithm = PTQ(config, policies)
    assert algorithm.quantization_config.gptq_args().damp_percent == 0.05
    network = algorithm.apply(tiny, datasets=calib_ids[:1])
    rows = dict(line.split() for line in algorithm.summary(network).splitlines())
    assert rows["model.layers.0.attention.wq"] == "w4a16_g32"
    assert rows["model.layers.0.feed_forward.w2"] == "w8a16"
    assert rows["model.layers.0.attention.wo"] == rows["lm_head"] == "float"
    assert type(network.model.layers[0].attention.key_quant).__name__ == "TokenKV"


def test_the_helper_runs_the_network(tiny, calib_ids):
    seen = []

    class Helper(NetworkHelper):
        def generate(self, network, input_ids, max_new_tokens=None, **kwargs):
            seen.append((input_ids.shape, max_new_tokens))
            return network.generate(input_ids, max_new_tokens=max_new_tokens)

    config = PTQConfig(**W8A8, opname_blacklist=HEAD)
    PTQ(config).apply(tiny, Helper(), calib_ids[:2])
    assert seen == [(calib_ids[0].shape, 1), (calib_ids[1].shape, 1)]


def test_a_mindspore_data_set(tiny, calib_ids):
    dataset = ms.dataset.NumpySlicesDataset(
        {"input_ids": [calib_ids[0][0, :16], calib_ids[1][0, :16]]}, shuffle=False
    )
    config = PTQConfig(**W8A8, opname_blacklist=HEAD)
    network = PTQ(config).apply(tiny, datasets=dataset)
    assert type(network.model.layers[3].feed_forward.w1).__name__ == "StaticLinear"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "deploy"}, InvalidValueError, "mode must be a PTQMode"),
        ({"backend": 1}, InvalidValueError, "backend must be a BackendTarget"),
        (
            {"weight_quant_dtype": ms.int4 if hasattr(ms, "int4") else ms.int16},
            ValueError,
            "weight",
        ),
        ({"act_quant_dtype": ms.qint4x2}, InvalidValueError, "act_quant_dtype must be int8"),
        ({"act_quant_granularity": "per_token"}, InvalidValueError, "must be a QuantGranularity"),
        ({"opname_blacklist": "lm_head"}, InvalidTypeError, "opname_blacklist must be a list"),
        ({"opname_blacklist": [1]}, InvalidTypeError, "opname_blacklist must be a list"),
        ({"outliers_suppression": "smooth"}, InvalidTypeError, "must be an OutliersSuppression"),
        ({"precision_recovery": "gptq"}, InvalidTypeError, "must be a PrecisionRecovery"),
        ({"group_size": "64"}, InvalidTypeError, "group_size must be int"),
        ({"group_size": 64}, RecipeError, "group_size must be one of"),
        (TOKEN, RecipeError, "per_token needs activation_dtype int8"),
        (
            W8A8 | {"weight_quant_granularity": QuantGranularity.PER_GROUP, "group_size": 64},
            RecipeError,
            "needs weight_quant_granularity per_channel",
        ),
        (
            {"kvcache_quant_granularity": QuantGranularity.PER_TOKEN},
            InvalidValueError,
            "PER_TOKEN needs kvcache_quant_dtype int8",
        ),
        (
            {"outliers_suppression": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE},
            RecipeError,
            "outliers_suppression: .*not 'outlier-suppression-lite'",
        ),
        ({"algo_args": 3}, InvalidValueError, "algo_args must be a dict or a dataclass"),
        (
            {"outliers_suppression": SMOOTH, "algo_args": AWQConfig()},
            RecipeError,
            "algorithm_args.duo_scaling: Extra inputs",
        ),
    ],
)
def test_bad_configurations(options, error, message):
    with pytest.raises(error, match=message):
        PTQConfig(**options)


def test_bad_calls(tiny, calib_ids, tmp_path):
    with pytest.raises(TypeError, match="config must be PTQConfig, not dict"):
        PTQ({})
    with pytest.raises(TypeError, match="layer_policies must be OrderedDict"):
        PTQ(PTQConfig(), {"w": PTQConfig()})
    with pytest.raises(TypeError, match="layer_policies must map str to PTQConfig"):
        PTQ(PTQConfig(), OrderedDict({"w": 3}))
    with pytest.raises(RecipeError, match="no regular expression"):
        PTQ(PTQConfig(), OrderedDict({"(": PTQConfig()}))
    with pytest.raises(ValueError, match="backend must be"):
        RoundToNearest(PTQConfig(backend=BackendTarget.NONE))
    with pytest.raises(ValueError, match="quant_method rtn quantizes weights and the cache only"):
        RoundToNearest(PTQConfig(**W8A8))
    with pytest.raises(ValueError, match="quant_method smooth_quant needs"):
        SmoothQuant(PTQConfig(**W8A8))
    smooth = PTQ(PTQConfig(**W8A8, opname_blacklist=HEAD))
    with pytest.raises(TypeError, match="network must be Cell, not int"):
        smooth.apply(3)
    with pytest.raises(TypeError, match="network_helper must be NetworkHelper"):
        smooth.apply(tiny, 3)
    with pytest.raises(ValueError, match="needs calibration data"):
        smooth.apply(tiny)
    with pytest.raises(ValueError, match="a sample has no input_ids, but tokens"):
        smooth.apply(tiny, datasets=[{"tokens": calib_ids[0]}])
    with pytest.raises(TypeError, match="datasets must be iterable"):
        smooth.apply(tiny, datasets=3)
    with pytest.raises(PlanError, match="'no_such' is in the name of no linear cell"):
        PTQ(PTQConfig(opname_blacklist=["no_such"])).apply(tiny)
    with pytest.raises(TypeError, match="ckpt_path must be str"):
        smooth.convert(tiny, tmp_path)
    with pytest.raises(ValueError, match="ckpt_path is no file"):
        smooth.convert(tiny, str(tmp_path / "no.ckpt"))
    with pytest.raises(TypeError, match="net_opt must be Cell"):
        smooth.convert(3)

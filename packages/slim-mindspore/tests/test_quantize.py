"""The Golden Stick flow on the example model: accuracy, layouts, round trips."""

import json
from collections import Counter

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest

from slim_core.errors import (
    CalibrationError,
    CheckpointError,
    FormatError,
    InvalidValueError,
    NumericalError,
    OutputExistsError,
    PlanError,
    StructureError,
)
from slim_core.numerics import affine_params, quantize_weight, weight_params
from slim_core.packing import pack_int4
from slim_core.scheme import QuantScheme
from slim_core.verify import verify_checkpoint
from slim_mindspore import (
    QuantizationConfig,
    load_llama,
    load_quantized,
    quantize_network,
    save_ascend,
    save_quantized,
)
from slim_mindspore.ckpt import CkptFile, read_ckpt, write_ckpt
from slim_mindspore.dequantize import dequantize_file
from slim_mindspore.evaluate import perplexity, relative_error
from slim_mindspore.hub import read_config
from slim_mindspore.linears import cell_at, find_linears, weight_of
from slim_mindspore.llama_config import LlamaConfig
from slim_mindspore.load import read_quantized
from slim_mindspore.names import to_hugging_face
from slim_mindspore.norms import smooth_into_norms
from slim_mindspore.statistics import collect
from slim_mindspore.tensors import load_tensors, parameters_of

HEAD = ["lm_head"]
W8A8 = {"weight_dtype": "int8", "activation_dtype": "int8"}
GROUPED = {"weight_quant_granularity": "per_group", "group_size": 32}
W4 = {"quant_method": "ptq", "weight_dtype": "int4"}
CONFIGS = {
    "rtn": {"quant_method": "rtn", "weight_dtype": "int8"},
    "w8": {"quant_method": "ptq", "weight_dtype": "int8"},
    "w8a8": {"quant_method": "ptq", **W8A8},
    "smooth": {"quant_method": "smooth_quant", **W8A8, "outliers_suppression": "smooth"},
    "smooth-w2": {
        "quant_method": "smooth_quant",
        **W8A8,
        "outliers_suppression": "smooth",
        "modules_to_not_convert": [*HEAD, "w2"],
    },
    "ptq-smooth": {"quant_method": "ptq", **W8A8, "outliers_suppression": "smooth"},
    "dynamic": {"quant_method": "ptq", **W8A8, "act_quant_granularity": "per_token"},
    "w4": W4,
    "w4g": {**W4, **GROUPED},
    "gptq": {
        "quant_method": "ptq",
        "weight_dtype": "int4",
        **GROUPED,
        "precision_recovery": "gptq",
    },
    "awq": {
        "quant_method": "ptq",
        "weight_dtype": "int4",
        **GROUPED,
        "outliers_suppression": "awq",
    },
    "kv": {"quant_method": "ptq", "kvcache_dtype": "int8"},
    "kv-token": {
        "quant_method": "ptq",
        "kvcache_dtype": "int8",
        "kvcache_quant_granularity": "per_token",
    },
}


@pytest.fixture(scope="module")
def made(tiny_dir, calib_ids):
    """Every configuration, quantized once."""
    results = {}

    def make(name):
        if name not in results:
            config = QuantizationConfig.build(**({"modules_to_not_convert": HEAD} | CONFIGS[name]))
            data = () if name in ("rtn", "w8", "w4", "w4g", "dynamic") else calib_ids
            results[name] = quantize_network(load_llama(tiny_dir), config, data)
        return results[name]

    return make


@pytest.fixture(scope="module")
def ids(eval_ids):
    return ms.Tensor(eval_ids[:512].reshape(4, 128))


@pytest.fixture(scope="module")
def exact(shared_model, ids):
    return shared_model(ids).asnumpy()


@pytest.fixture(scope="module")
def error(made, ids, exact):
    return lambda name: relative_error(made(name).network(ids).asnumpy(), exact)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("rtn", 0.005),
        ("w8a8", 0.05),
        ("smooth-w2", 0.03),
        ("ptq-smooth", 0.03),
        ("dynamic", 0.02),
        ("w4", 0.12),
        ("kv", 0.02),
        ("kv-token", 0.005),
    ],
)
def test_logits_stay_close(error, name, bound):
    assert 0 < error(name) <= bound


def test_better_methods_are_better(error):
    assert error("w4g") < error("w4")
    assert error("gptq") < error("w4g")
    assert error("awq") < error("w4g")
    assert error("ptq-smooth") < error("w8a8")


@pytest.fixture(scope="module")
def loss(shared_model, eval_ids):
    """Relative increase of perplexity on twelve rows of text."""
    before = perplexity(shared_model, eval_ids, window=128, batch=4)
    return lambda network: perplexity(network, eval_ids, window=128, batch=4) / before - 1


def test_perplexity_and_tokens_of_rtn(made, shared_model, eval_ids, loss):
    assert abs(loss(made("rtn").network)) <= 5e-4
    for layer in made("rtn").layers.values():
        assert np.isfinite(layer.layer.weight_scale).all()
        assert (layer.layer.weight_scale > 0).all()
    prompt = eval_ids[:16].reshape(2, 8)
    ours, theirs = (
        network.generate(prompt, max_new_tokens=16)
        for network in (made("rtn").network, shared_model)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_perplexity_of_smooth_quant(made, loss):
    assert loss(made("smooth-w2").network) <= 5e-3


def test_groups_of_64(tiny_dir, shared_model, calib_ids, loss):
    """352 inputs of w2 are no multiple of 64, so it stays in floating point throughout."""
    made = {}
    groups = {"weight_quant_granularity": "per_group", "group_size": 64}
    for name, options in {
        "channel": {},
        "group": groups,
        "gptq": groups | {"precision_recovery": "gptq"},
    }.items():
        config = QuantizationConfig.build(**W4, **options, modules_to_not_convert=[*HEAD, "w2"])
        made[name] = quantize_network(load_llama(tiny_dir), config, calib_ids)
    assert 0 < loss(made["group"].network) < loss(made["channel"].network)
    cells = {name: cell_at(shared_model, name) for name in made["gptq"].layers}
    inputs = collect(shared_model, cells, calib_ids, hessian=True)
    ratios = []
    for name, cell in cells.items():
        errors = [
            made[kind].layers[name].dequantized() - weight_of(cell).astype(np.float64)
            for kind in ("gptq", "group")
        ]
        gptq, rounding = (np.sum((error @ inputs[name].gram) * error) for error in errors)
        ratios.append(gptq / rounding)
    assert np.mean(np.asarray(ratios) <= 0.9) >= 0.8


@pytest.mark.parametrize("name", ["rtn", "w8a8", "dynamic", "awq", "kv-token"])
def test_graph_mode_equals_pynative(made, ids, name, graph_mode):
    graph = made(name).network(ids).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert np.abs(graph - made(name).network(ids).asnumpy()).max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "layout", "bound"),
    [
        ("rtn", None, 0.0),
        ("w8", None, 0.0),
        ("w8a8", None, 1e-5),
        ("smooth", None, 0.05),  # gs-sq keeps the input scales in float16
        ("ptq-smooth", None, 2e-3),  # scales are multiplied and divided: ties may fall otherwise
        ("dynamic", None, 0.0),
        ("w4", None, 0.0),
        ("awq", None, 1e-5),
        ("gptq", None, 0.0),
        ("kv", None, 0.0),
        ("kv-token", None, 0.0),
        ("rtn", "gs-ptq", 0.0),
        ("w8a8", "gs-sq", 0.05),
        ("w8a8", "msmodelslim", 0.05),  # the input scale in float16
    ],
)
def test_files_compute_what_the_network_does(made, ids, tiny_dir, tmp_path, name, layout, bound):
    logits = made(name).network(ids).asnumpy()
    loaded = []
    for kind in ("ckpt", "safetensors"):
        file = save_quantized(made(name), tmp_path / kind / f"m.{kind}", layout=layout)
        assert file.stat().st_mode & 0o777 == 0o400
        assert file.with_name("quant_model_description.json").stat().st_mode & 0o777 == 0o600
        loaded.append(load_quantized(file, read_config(tiny_dir))(ids).asnumpy())
    np.testing.assert_array_equal(loaded[0], loaded[1])
    assert relative_error(loaded[0], logits) <= bound


@pytest.mark.parametrize("form", ["m.ckpt", "m.safetensors", "directory"])
def test_an_interrupted_save_leaves_nothing(made, tiny_dir, tmp_path, monkeypatch, form):
    target = tmp_path / "new" / form

    def save():
        if form == "directory":
            return save_ascend(made("w8"), tiny_dir, target)
        return save_quantized(made("w8"), target)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert save().exists()


def test_names_of_the_layouts(made, tmp_path):
    expected = {
        "rtn": {
            "_handler.weight": ("int8", (64, 128)),
            "_weight_quantizer.scale": ("float32", (64,)),
            "_weight_quantizer.zp_neg": ("float32", (64,)),
        },
        "smooth": {
            "_handler.weight": ("int8", (64, 128)),
            "_handler.bias": ("float32", (64,)),
            "_input_quantizer.t_scale": ("float16", (128,)),
            "_input_quantizer.t_zp": ("int8", (128,)),
            "_output_quantizer.scale": ("int64", (64,)),
        },
        "ptq-smooth": {
            "_layer.weight": ("int8", (64, 128)),
            "_layer.matmul.quant_bias": ("int32", (64,)),
            "_layer.matmul.dequant_scale": ("int64", (64,)),
            "quant_op.input_scale": ("float32", (128,)),
            "quant_op.input_zp": ("int8", (128,)),
        },
        "w8a8": {
            "_layer.weight": ("int8", (64, 128)),
            "_layer.matmul.quant_bias": ("int32", (64,)),
            "_layer.matmul.dequant_scale": ("int64", (64,)),
            "quant_op.input_scale": ("float32", (1,)),
            "quant_op.input_zp": ("int8", (1,)),
        },
        "dynamic": {
            "_layer.weight": ("int8", (64, 128)),
            "_layer.matmul.weight_scale": ("float32", (64,)),
        },
        "awq": {
            "_layer.weight": ("int8", (128, 32)),
            "_layer.matmul.weight_scale": ("float32", (4, 64)),
            "_layer.matmul.weight_zp": ("float32", (4, 64)),
            "_layer.matmul.smooth_scale": ("float32", (128,)),
        },
    }
    prefix = "model.layers.2.attention.wk."
    for name, tensors in expected.items():
        file = CkptFile(save_quantized(made(name), tmp_path / name / "m.ckpt"))
        found = {
            key.removeprefix(prefix): (info.dtype.name, info.shape)
            for key, info in file.tensors.items()
            if key.startswith(prefix)
        }
        assert found == tensors, name
        assert (f"{prefix}_layer.weight" in file.int4) == (name == "awq")
        assert "model.layers.2.attention_norm.weight" in file.tensors
        assert "lm_head.weight" in file.tensors


def test_description(made, tmp_path):
    file = save_quantized(made("awq"), tmp_path / "m.ckpt")
    description = json.loads(file.with_name("quant_model_description.json").read_text())
    assert description["model_quant_type"] == "W4A16"
    config = QuantizationConfig.from_dict(description["quantization_config"])
    assert config == made("awq").config
    kinds = Counter(v for k, v in description.items() if k in CkptFile(file).tensors)
    assert kinds == {"W4A16": 28 * 4, "FLOAT": 11}


@pytest.mark.parametrize("name", ["w8", "w8a8", "dynamic", "w4", "w4g", "kv"])
def test_ascend_directories(tiny_dir, calib_ids, ids, tmp_path, name):
    config = QuantizationConfig.build(
        **CONFIGS[name], modules_to_not_convert=HEAD, weight_range="symmetric"
    )
    made = quantize_network(load_llama(tiny_dir), config, calib_ids)
    out = save_ascend(made, tiny_dir, tmp_path / "out")
    if name != "kv":
        verification = verify_checkpoint(out)
        assert verification.sound, verification.problems
        assert verification.layers == 28
    loaded = load_quantized(out)(ids).asnumpy()
    assert relative_error(loaded, made.network(ids).asnumpy()) <= 1e-6
    with pytest.raises(OutputExistsError):
        save_ascend(made, tiny_dir, out)
    # The integers are those of the formulas that slim-ptq uses.
    source, stored = load_tensors(tiny_dir), load_tensors(out)
    scheme = config.scheme().weight
    for cell in made.layers:
        key = to_hugging_face(f"{cell}.weight")
        weight = source[key].astype(np.float32)
        scale, offset = weight_params(weight, scheme)
        codes = quantize_weight(weight, scale, offset, scheme)
        if name.startswith("w4"):  # per channel along the inputs, per group along the outputs
            codes = pack_int4(codes, axis=1 if name == "w4" else 0)
        np.testing.assert_array_equal(stored[key], codes)
        np.testing.assert_array_equal(stored[f"{key}_scale"], scale)


@pytest.mark.parametrize("name", ["ptq-smooth", "awq"])
def test_smoothing_into_norms(tiny_dir, shared_model, calib_ids, ids, exact, tmp_path, name):
    config = QuantizationConfig.build(
        **CONFIGS[name],
        modules_to_not_convert=HEAD,
        weight_range="symmetric",
        smooth_into="norm",
    )
    made = quantize_network(load_llama(tiny_dir), config, calib_ids[:3], storage=ml_dtypes.bfloat16)
    assert len(made.changed) == 4 * (2 + 3 + 2)
    assert not any(layer.smooth is not None for layer in made.layers.values())
    logits = made.network(ids).asnumpy()
    assert relative_error(logits, exact) <= 0.06
    out = save_ascend(made, tiny_dir, tmp_path / "out")
    assert verify_checkpoint(out).sound
    assert relative_error(load_quantized(out)(ids).asnumpy(), logits) <= 1e-6
    norm = load_tensors(out)["model.layers.0.input_layernorm.weight"]
    assert norm.dtype == ml_dtypes.bfloat16
    before = parameters_of(shared_model)["model.layers.0.attention_norm.weight"]
    assert np.abs(norm.astype(np.float32) / before - 1).max() > 0.1


def test_smoothed_norms_leave_the_float_network_as_it_was(tiny, ids, exact, calib_ids):
    config = QuantizationConfig.build(**CONFIGS["ptq-smooth"], smooth_into="norm")
    smooth_into_norms(tiny, find_linears(tiny), config, calib_ids[:2], np.float32)
    assert relative_error(tiny(ids).asnumpy(), exact) <= 1e-5


def test_input_ranges_are_those_of_the_data(made, tiny_dir, calib_ids):
    network = load_llama(tiny_dir)
    name = "model.layers.1.feed_forward.w1"
    seen = []
    cell = network.model.layers[1].feed_forward.w1
    cell.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].asnumpy()))
    for batch in calib_ids:
        network(ms.Tensor(batch.astype(np.int32)))
    low = np.float32([min(x.min() for x in seen)])
    high = np.float32([max(x.max() for x in seen)])
    scheme = QuantScheme.parse("w8a8").activation
    scale, offset = affine_params(low, high, scheme)
    layer = made("w8a8").layers[name].layer
    np.testing.assert_allclose(layer.input_scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(layer.input_offset, offset)


def test_float16_files(made, ids, tiny_dir, tmp_path):
    file = save_quantized(made("w4g"), tmp_path / "m.ckpt", compute_dtype="float16")
    info = CkptFile(file).tensors
    assert info["lm_head.weight"].dtype == np.float16
    assert info["model.layers.0.attention.wq._layer.matmul.weight_scale"].dtype == np.float16
    loaded = load_quantized(file, read_config(tiny_dir))(ids).asnumpy()
    assert relative_error(loaded, made("w4g").network(ids).asnumpy()) <= 3e-3
    float32 = save_quantized(made("rtn"), tmp_path / "32" / "m.ckpt")
    whole = sum(array.nbytes for array in parameters_of(load_llama(tiny_dir)).values())
    assert float32.stat().st_size <= 0.60 * whole


@pytest.mark.parametrize("names", ["mindformers", "hugging_face"])
def test_dequantizing(made, ids, tiny_dir, tmp_path, names):
    source = save_quantized(made("awq"), tmp_path / "q" / "m.ckpt")
    target = tmp_path / f"f.{'ckpt' if names == 'mindformers' else 'safetensors'}"
    dequantize_file(source, target, names=names)
    network = load_llama(target, read_config(tiny_dir))
    logits = made("awq").network(ids).asnumpy()
    assert relative_error(network(ids).asnumpy(), logits) <= 1e-5
    with pytest.raises(InvalidValueError, match=r"must end in \.ckpt or \.safetensors"):
        dequantize_file(source, tmp_path / "f.bin")
    kv = save_quantized(made("kv-token"), tmp_path / "kv" / "m.ckpt")
    with pytest.raises(StructureError, match="no layer of the checkpoint is quantized"):
        dequantize_file(kv, tmp_path / "g.ckpt")


def test_damaged_files_are_named(made, tiny_dir, tmp_path):
    file = save_quantized(made("rtn"), tmp_path / "m.ckpt")
    tensors = read_ckpt(file)
    config = read_config(tiny_dir)
    cell = "model.layers.0.attention.wq"
    for change, error, message in [
        ({f"{cell}._weight_quantizer.zp_neg": None}, FormatError, f"{cell} has no _weight_quant"),
        ({f"{cell}._weight_quantizer.scale": np.ones(3, np.float32)}, FormatError, "must have sh"),
        (
            {f"{cell}._handler.weight": np.ones((128, 128))},
            FormatError,
            "must be int8, not float64",
        ),
        ({f"{cell}.extra": np.ones(3)}, FormatError, f"{cell} has tensors of no use: extra"),
        ({"model.norm_out.weight": None}, CheckpointError, "model.norm_out.weight is missing"),
        ({"model.more.weight": np.ones(3)}, CheckpointError, "model.more.weight is not expected"),
    ]:
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        write_ckpt(tmp_path / "bad.ckpt", changed)
        with pytest.raises(error, match=message):
            load_quantized(tmp_path / "bad.ckpt", config)
    with pytest.raises(CheckpointError, match="the network"):
        load_quantized(file, LlamaConfig(2048, 64, 352, 4, 8, 4, 16))


def test_problems_are_found_before_work(tiny, calib_ids, tmp_path, made):
    def attempt(data=(), **changes):
        config = QuantizationConfig.build(**({"quant_method": "ptq"} | changes))
        return quantize_network(tiny, config, data)

    with pytest.raises(PlanError) as info:
        attempt(weight_dtype="int4", weight_quant_granularity="per_group", group_size=64)
    assert len(info.value.problems) == 4
    assert "model.layers.0.feed_forward.w2: group_size 64 does not divide 352" in str(info.value)
    with pytest.raises(PlanError, match="group_size 128 is all of its inputs; use per_channel"):
        attempt(weight_dtype="int4", weight_quant_granularity="per_group", group_size=128)
    with pytest.raises(PlanError, match="'lmhead' is in the name of no linear cell"):
        attempt(weight_dtype="int8", modules_to_not_convert=["lmhead"])
    with pytest.raises(PlanError, match="'wx' is found in the name of no linear cell"):
        attempt(weight_dtype="int8", layer_policies={"wx": {}})
    with pytest.raises(PlanError, match="leaves no linear cell"):
        attempt(weight_dtype="int8", modules_to_not_convert=["w", "lm_head"])
    with pytest.raises(CalibrationError, match="needs calibration data"):
        attempt(**W8A8)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        attempt(kvcache_dtype="int8")
    with pytest.raises(PlanError, match="gs-rtn holds w8a16 per channel only, not w4a16_g32"):
        save_quantized(made("w4g"), tmp_path / "m.ckpt", layout="gs-rtn")
    with pytest.raises(PlanError, match="msmodelslim holds w8a8 only, not w8a8 with smoothing"):
        save_quantized(made("ptq-smooth"), tmp_path / "m.ckpt", layout="msmodelslim")
    with pytest.raises(InvalidValueError, match="the suffix of path must be one of"):
        save_quantized(made("rtn"), tmp_path / "m.bin")
    with pytest.raises(FormatError, match="no place for scales that divide the input"):
        save_ascend(made("smooth"), tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nan_in_a_weight_names_the_layer(tiny):
    cell = tiny.model.layers[1].attention.wv
    weight = cell.weight.asnumpy().copy()
    weight[0, 0] = np.nan
    cell.weight.set_data(ms.Tensor(weight))
    config = QuantizationConfig.build(quant_method="rtn", weight_dtype="int8")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.attention\.wv has 1 NaN"):
        quantize_network(tiny, config)


@pytest.mark.oracle
def test_golden_stick_wrote_the_same_file(golden, tmp_path):
    config = LlamaConfig(128, 64, 96, 2, 4, 2, 16, rms_norm_eps=1e-5)
    network = load_llama(golden / "model.ckpt", config)
    rtn = QuantizationConfig.build(
        quant_method="rtn", weight_dtype="int8", modules_to_not_convert=HEAD
    )
    made = quantize_network(network, rtn)
    ours = read_ckpt(save_quantized(made, tmp_path / "rtn.ckpt"))
    theirs = read_ckpt(golden / "rtn.ckpt")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        if name.endswith("_handler.weight"):
            assert np.mean(ours[name] == array) >= 0.999
        else:
            np.testing.assert_allclose(ours[name], array, rtol=1e-6)


def test_sparse_checkpoints_run_too(golden):
    content = read_quantized(golden / "quant.ckpt")
    assert len(content.layers) == 13
    assert content.layers["model.layers.1.attention.wo"].method == "sparse"

import json
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from slim_core.errors import (
    CalibrationError,
    CheckpointError,
    InvalidTypeError,
    InvalidValueError,
    PatternError,
)
from slim_mindspore import Calibrator, QuantConfig
from slim_mindspore.ckpt import read_ckpt, write_ckpt
from slim_mindspore.evaluate import perplexity, relative_error
from slim_mindspore.tensors import parameters_of

SEED_PATTERN = (
    r"^(?=.{1,100}$)model\.layers\.\d+\.(attention[^_]|feed_forward|augs_attn\d+).*\.weight$"
)
DISABLED = "model.layers.0.attention.wo"


@pytest.fixture(scope="module")
def run(shared_model, float_ckpt, calib_ids, tmp_path_factory):
    calibrator = Calibrator(
        cfg=QuantConfig(disable_names=[DISABLED], fraction=0.03),
        model=shared_model,
        model_ckpt=str(float_ckpt),
        calib_data=[[ids] for ids in calib_ids],
    )
    calibrator.run()
    path = tmp_path_factory.mktemp("sparse") / "out" / "quant_weight.ckpt"
    calibrator.save(str(path))
    return calibrator, path


@pytest.mark.parametrize("fraction", [0.01, 0.03, 0.1])
def test_fractions_that_are_allowed(fraction):
    assert QuantConfig(fraction=fraction).fraction == fraction


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fraction": 0.005}, InvalidValueError, "fraction must be in .0.01, 0.1., not 0.005"),
        ({"fraction": 0.11}, InvalidValueError, "fraction"),
        ({"fraction": float("nan")}, InvalidValueError, "fraction"),
        ({"fraction": 1}, InvalidTypeError, "fraction must be float, not int"),
        ({"fraction": "a"}, InvalidTypeError, "fraction must be float, not str"),
        ({"disable_names": ("a",)}, InvalidTypeError, "disable_names must be list, not tuple"),
        ({"disable_names": [1]}, InvalidValueError, r"disable_names\[0\] must be str"),
        ({"w_bit": 8}, TypeError, "w_bit"),
    ],
)
def test_bad_configurations(options, error, message):
    with pytest.raises(error, match=message):
        QuantConfig(**options)


def test_tensors_of_the_file(run, float_ckpt):
    saved, source = ms.load_checkpoint(str(run[1])), read_ckpt(float_ckpt)
    quantized = [k for k in source if re.search(SEED_PATTERN, k) and k != f"{DISABLED}.weight"]
    assert len(quantized) == 27
    for key in quantized:
        name, rows = key.removesuffix(".weight"), source[key].shape[0]
        found = [
            (saved[f"{name}.{local}"].dtype, saved[f"{name}.{local}"].shape)
            for local in ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
        ]
        assert found == [
            (ms.int8, source[key].shape),
            (ms.float16, (1,)),
            (ms.int8, (1,)),
            (ms.int32, (rows,)),
            (ms.int64, (rows,)),
        ]
    assert len(saved) == len(source) + 4 * 27
    for key in source.keys() - set(quantized):
        np.testing.assert_array_equal(saved[key].asnumpy(), source[key])


def test_modes_sizes_and_description(run, float_ckpt):
    path = run[1]
    description = path.with_name("quant_model_description.json")
    assert path.parent.stat().st_mode & 0o777 == 0o750
    assert path.stat().st_mode & 0o777 == 0o400
    assert description.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size <= 0.60 * float_ckpt.stat().st_size
    types = json.loads(description.read_text())
    assert types["model_quant_type"] == "W8A8S"
    assert types["model.layers.1.feed_forward.w2.deq_scale"] == "W8A8S"
    assert types[f"{DISABLED}.weight"] == "FLOAT"
    assert types.keys() - {"version", "model_quant_type"} == read_ckpt(path).keys()


def test_perplexity_barely_moves(run, shared_model, eval_ids):
    before = perplexity(shared_model, eval_ids, window=128, batch=4)
    after = perplexity(run[0].fake_quantize_model(), eval_ids, window=128, batch=4)
    assert before != after
    assert after <= 1.04 * before


def test_the_source_network_stays(run, shared_model, float_ckpt):
    for name, array in parameters_of(shared_model).items():
        np.testing.assert_array_equal(array, read_ckpt(float_ckpt)[name])


class Biased(nn.Cell):
    def __init__(self):
        super().__init__()
        self.fc = nn.Dense(60, 10, activation="relu")
        self.out = nn.Dense(10, 60, has_bias=False)

    def construct(self, x):
        return self.out(self.fc(x))


@pytest.fixture
def biased(tmp_path):
    random = np.random.default_rng(0)
    network = Biased()
    network.fc.weight.set_data(ms.Tensor(random.standard_normal((10, 60)).astype(np.float32)))
    network.fc.bias.set_data(ms.Tensor(random.standard_normal(10).astype(np.float32)))
    network.out.weight.set_data(ms.Tensor(random.standard_normal((60, 10)).astype(np.float32)))
    tensors = parameters_of(network)
    # A bias in front of its weight must not change what is written.
    path = tmp_path / "biased.ckpt"
    write_ckpt(path, {"fc.bias": tensors.pop("fc.bias"), **tensors})
    samples = [[random.uniform(-2, 3, (4, 60)).astype(np.float32)] for _ in range(3)]
    return network, path, samples


def test_any_cell_with_biases_and_activations(biased, tmp_path):
    network, path, samples = biased
    calibrator = Calibrator(QuantConfig(), network, path, samples, pattern="fc|out")
    calibrator.run()
    calibrator.save(str(tmp_path / "q.ckpt"))
    saved = read_ckpt(tmp_path / "q.ckpt")
    assert "fc.bias" not in saved
    low = np.float32(np.mean([sample[0].min() for sample in samples]))
    high = np.float32(np.mean([sample[0].max() for sample in samples]))
    scale = (high - low) / np.float32(255)
    assert saved["fc.input_scale"][0] == np.float16(scale)
    assert saved["fc.input_offset"][0] == np.rint(-low / scale) - 128
    x = samples[0][0]
    scale, offset = saved["fc.input_scale"].astype(np.float32), saved["fc.input_offset"]
    codes = np.clip(np.rint(x / scale + offset), -128, 127).astype(np.int64)
    deq = saved["fc.deq_scale"].astype(np.uint32).view(np.float32)
    integer = (codes @ saved["fc.weight"].astype(np.int64).T + saved["fc.quant_bias"]) * deq
    fake = calibrator.fake_quantize_model().fc(ms.Tensor(x)).asnumpy()
    assert relative_error(np.maximum(integer, 0), fake) < 2e-3
    exact = network.fc(ms.Tensor(x)).asnumpy()
    assert 0 < relative_error(fake, exact) < 0.2


def test_forward_fn(biased, tmp_path):
    network, path, samples = biased
    seen = []

    def forward(model, sample):
        seen.append(sample)
        model(ms.Tensor(sample["x"]))

    data = [{"x": sample[0]} for sample in samples]
    calibrator = Calibrator(QuantConfig(), network, path, data, forward_fn=forward, pattern="fc")
    calibrator.run()
    assert len(seen) == 3
    with pytest.raises(InvalidTypeError, match="forward_fn must be callable"):
        Calibrator(QuantConfig(), network, path, data, forward_fn=3, pattern="fc")


def test_bad_arguments(biased, tmp_path):
    network, path, samples = biased
    good = {"cfg": QuantConfig(), "model": network, "model_ckpt": path, "calib_data": samples}
    for change, error, message in [
        ({"cfg": 3}, InvalidTypeError, "cfg must be QuantConfig, not int"),
        ({"model": 3}, InvalidTypeError, "model must be Cell, not int"),
        ({"model_ckpt": 3}, InvalidTypeError, "path must be str or os.PathLike, not int"),
        ({"model_ckpt": "/nope.ckpt"}, FileNotFoundError, "no such file: /nope.ckpt"),
        ({"calib_data": "abc"}, InvalidTypeError, "calib_data must be list, not str"),
        ({"calib_data": []}, CalibrationError, "calib_data is empty"),
        ({}, PatternError, "no linear cell is left to quantize"),
        ({"pattern": "("}, InvalidValueError, "pattern is no regular expression"),
        ({"cfg": QuantConfig(["fx"]), "pattern": "fc"}, PatternError, "no linear cell 'fx'"),
    ]:
        with pytest.raises(error, match=message):
            Calibrator(**(good | change))


def test_a_checkpoint_that_does_not_fit(biased, tmp_path):
    network, _, samples = biased
    path = tmp_path / "other.ckpt"
    write_ckpt(path, {"out.weight": np.zeros((60, 11), np.float32)})
    with pytest.raises(CheckpointError) as info:
        Calibrator(QuantConfig(), network, path, samples, pattern="fc|out")
    assert "fc.weight is missing" in str(info.value)
    assert "out.weight has shape (60, 11), the model (60, 10)" in str(info.value)


def test_samples_that_cannot_be_run(biased):
    network, path, _ = biased
    calibrator = Calibrator(
        QuantConfig(), network, path, [[np.zeros((2, 61), np.float32)]], pattern="fc"
    )
    with pytest.raises(CalibrationError, match="cannot run sample 0"):
        calibrator.run()
    calibrator = Calibrator(
        QuantConfig(), network, path, [1], forward_fn=lambda *_: None, pattern="fc"
    )
    with pytest.raises(CalibrationError, match="never reached fc"):
        calibrator.run()


def test_saving_too_early_or_to_the_wrong_place(biased, tmp_path):
    network, path, samples = biased
    calibrator = Calibrator(QuantConfig(), network, path, samples, pattern="fc")
    with pytest.raises(RuntimeError, match="call run"):
        calibrator.save(str(tmp_path / "q.ckpt"))
    calibrator.run()
    for target, error, message in [
        (3, InvalidTypeError, "output_path must be str, not int"),
        (str(tmp_path / "q.bin"), InvalidValueError, "must end in .ckpt, not 'q.bin'"),
        (str(tmp_path / "no" / "where" / "q.ckpt"), InvalidValueError, "does not exist"),
    ]:
        with pytest.raises(error, match=message):
            calibrator.save(target)
    with pytest.raises(InvalidValueError, match="weight_dtype must be one of"):
        calibrator.save(str(tmp_path / "q.ckpt"), weight_dtype="int4")


def test_an_interrupted_save_leaves_the_old_file(biased, tmp_path, monkeypatch):
    network, path, samples = biased
    calibrator = Calibrator(QuantConfig(), network, path, samples, pattern="fc")
    calibrator.run()
    target = tmp_path / "q.ckpt"
    calibrator.save(str(target))
    before = target.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        calibrator.save(str(target))
    assert target.read_bytes() == before
    assert not list(tmp_path.glob(".*tmp"))


def test_without_data_on_request(biased, tmp_path):
    network, path, _ = biased
    calibrator = Calibrator(QuantConfig(), network, path, pattern="fc", allow_uncalibrated=True)
    calibrator.run()
    calibrator.save(str(tmp_path / "q.ckpt"))
    saved = read_ckpt(tmp_path / "q.ckpt")
    assert (saved["fc.input_scale"][0], saved["fc.input_offset"][0]) == (1.0, 1)

import pickle
import stat

import numpy as np
import pytest

from slim_core.formats import FORMATS, NpyWriter
from slim_core.layers import QuantizedLinear
from slim_core.scheme import QuantScheme


def layer(name, text, bias=None):
    scheme = QuantScheme.parse(text)
    static = {}
    if scheme.is_static:
        static = {"input_scale": np.float32([0.5]), "input_offset": np.float32([3.0])}
    return QuantizedLinear(
        name,
        scheme,
        np.array([[1, -2], [3, 4]], np.int8),
        np.float32([[0.5], [0.25]]),
        np.float32([[0.0], [0.0]]),
        bias=bias,
        model_dtype="float16",
        **static,
    )


def read(path):
    return np.load(path, allow_pickle=True).item()


def write(directory, **options):
    writer = NpyWriter(directory, **options)
    form = FORMATS["safe_tensor"]
    writer.add("a.q", form.encode(layer("a.q", "w8a8", np.float16([1.0, 2.0]))))
    writer.add("a.o", form.encode(layer("a.o", "w8a16")))
    writer.add("a.input_layernorm", {"weight": np.float16([1.0]), "bias": np.float16([2.0])})
    writer.add("embed_tokens", {"weight": np.float16([[3.0]])})
    return writer.close()


def test_one_dictionary_a_kind_of_parameter(tmp_path):
    files = {path.stem: read(path) for path in write(tmp_path)}
    assert {stem: list(content) for stem, content in files.items()} == {
        "quant_weight": ["a.q", "a.o", "embed_tokens"],
        "weight_scale": ["a.q", "a.o"],
        "weight_offset": ["a.q", "a.o"],
        "input_scale": ["a.q"],
        "input_offset": ["a.q"],
        "quant_bias": ["a.q"],
        "deq_scale": ["a.q"],
        "fp_bias": ["a.q"],
        "anti_fp_norm": ["a.input_layernorm.weight", "a.input_layernorm.bias"],
    }
    np.testing.assert_array_equal(files["quant_weight"]["a.q"], [[1, -2], [3, 4]])
    assert files["quant_weight"]["a.q"].dtype == np.int8
    assert files["fp_bias"]["a.q"].tolist() == [1.0, 2.0]
    assert files["deq_scale"]["a.q"].tolist() == [0x3E800000, 0x3E000000]
    assert files["anti_fp_norm"]["a.input_layernorm.bias"].tolist() == [2.0]


def test_files_are_read_only_and_alone(tmp_path):
    paths = write(tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o400}


def test_values_can_be_converted(tmp_path):
    write(tmp_path, convert=list)
    assert isinstance(read(tmp_path / "fp_bias.npy")["a.q"], list)


def test_nothing_gives_no_files(tmp_path):
    assert NpyWriter(tmp_path).close() == []
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_other_names_keep_them(tmp_path):
    writer = NpyWriter(tmp_path)
    writer.add("a.attn", {"inv_freq": np.float32([1.0])})
    writer.close()
    assert list(read(tmp_path / "quant_weight.npy")) == ["a.attn.inv_freq"]


def test_failed_write_leaves_no_half_file(tmp_path):
    writer = NpyWriter(tmp_path, convert=lambda array: lambda: array)  # cannot be pickled
    writer.add("a", {"weight": np.ones(3)})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        writer.close()
    assert list(tmp_path.iterdir()) == []

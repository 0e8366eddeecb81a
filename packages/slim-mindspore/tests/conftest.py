from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from slim_core.dtypes import INT8
from slim_core.layers import QuantizedLinear
from slim_core.numerics import quantize_weight, weight_params
from slim_core.scheme import Granularity, QuantScheme, TensorScheme
from slim_mindspore.ckpt import write_ckpt
from slim_mindspore.hub import load_llama
from slim_mindspore.modes import prepare_cpu
from slim_mindspore.tensors import parameters_of
from slim_mindspore.text import load_tokenizer

prepare_cpu()

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared"
TINY = ROOT / "examples" / "tiny-llama"
GOLDEN = SHARED / "data" / "mindspore_golden"


@pytest.fixture(scope="session")
def tiny_dir():
    return TINY


@pytest.fixture(scope="session")
def golden():
    if not GOLDEN.is_dir():
        pytest.skip(f"the golden checkpoints are not at {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def shared_model():
    """One network for all tests that leave it as it is."""
    return load_llama(TINY)


@pytest.fixture
def tiny():
    """A network of its own for tests that change it."""
    return load_llama(TINY)


@pytest.fixture(scope="session")
def float_ckpt(shared_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "model.ckpt"
    write_ckpt(path, parameters_of(shared_model))
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="session")
def eval_ids(tokenizer):
    text = (ROOT / "examples" / "eval.txt").read_text(encoding="utf-8")
    return np.asarray(tokenizer.encode(text).ids, np.int32)[: 128 * 12]


@pytest.fixture(scope="session")
def calib_ids(tokenizer):
    lines = (ROOT / "examples" / "calib.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    return [np.asarray([tokenizer.encode(json.loads(line)["text"]).ids[:128]]) for line in lines]


@pytest.fixture
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(scope="session")
def make_layer():
    """A function that makes a quantized layer of random numbers with eight outputs."""
    return _make_layer


def _make_layer(columns, activation=None, weight=None, extreme=False):
    random = np.random.default_rng(0)
    weight = weight or TensorScheme(INT8, Granularity.PER_CHANNEL)
    values = random.standard_normal((8, columns)).astype(np.float32)
    if extreme:
        values = np.sign(values)  # every code at the end of its range: the largest sums
    scale, offset = weight_params(values, weight)
    return QuantizedLinear(
        name="p",
        scheme=QuantScheme(weight, activation),
        codes=quantize_weight(values, scale, offset, weight),
        weight_scale=scale,
        weight_offset=offset,
        input_scale=np.float32([0.02]),
        input_offset=np.float32([-5]),
        bias=random.standard_normal(8).astype(np.float32),
    )

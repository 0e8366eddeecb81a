"""Weights as sparse quantization makes them, and checkpoints around them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from slim_compress import _native
from slim_core.checkpoint import ShardWriter


@pytest.fixture
def sparse() -> Callable[..., np.ndarray]:
    """Return a function that makes an int8 matrix: mostly within 4 bits, a few outliers."""

    def make(n: int, k: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        values = np.rint(rng.normal(0, 2.7, (n, k)))
        outliers = rng.random((n, k)) < 0.004
        values[outliers] = rng.integers(-128, 128, outliers.sum())
        return np.clip(values, -128, 127).astype(np.int8)

    return make


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each instruction set of this machine."""
    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(before)


@pytest.fixture
def checkpoint(tmp_path: Path, sparse: Callable[..., np.ndarray]) -> Path:
    """Return a W8A8S directory with weights, their parameters, norms and side files."""
    directory = tmp_path / "w8a8s"
    directory.mkdir()
    description: dict[str, object] = {"model_quant_type": "W8A8S", "version": "1.0.0"}
    rng = np.random.default_rng(1)
    with ShardWriter(directory, "quant_model_weight_w8a8s") as writer:
        for layer, (n, k) in enumerate([(200, 300), (129, 257), (64, 512)]):
            stem = f"model.layers.{layer}.mlp.up_proj"
            tensors = {
                "weight": sparse(n, k, layer),
                "deq_scale": rng.integers(1, 1 << 30, n),
                "quant_bias": rng.integers(-99, 99, n).astype(np.int32),
                "input_scale": np.array([0.25], np.float32),
            }
            for part, array in tensors.items():
                writer.add(f"{stem}.{part}", array)
                description[f"{stem}.{part}"] = "W8A8S"
        writer.add("model.norm.weight", np.ones(8, np.float16))
        description["model.norm.weight"] = "FLOAT"
        writer.add("model.layers.0.input_layernorm.weight", sparse(4, 8))
        description["model.layers.0.input_layernorm.weight"] = "W8A8S"
    (directory / "quant_model_description.json").write_text(json.dumps(description))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    for file in directory.iterdir():
        file.chmod(0o600)
    return directory

"""What other projects read out of checkpoints in their formats, with their own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import SlimError
from slim_core.numerics import split_groups
from slim_core.quantized import QuantizedCheckpoint
from slim_ptq import quantize
from slim_ptq.load import as_torch, load_model
from slim_ptq.tensors import from_numpy

MODEL = Path(__file__).parents[3] / "examples" / "tiny-llama"
LAYER = "model.layers.1.mlp.down_proj"

# Float16 or bfloat16 scales, and products in the dtype that a kernel has, are no nearer.  The
# 4-bit model itself is 12 % away from the float one.
NEAR = 0.01


def written(root: Path, form: str, scheme: str) -> tuple[Path, Path]:
    """Write the same integers in a format of another tool and in that of Ascend."""
    foreign, own = root / form, root / "ascend"
    quantize(MODEL, foreign, scheme=scheme, format=form)
    quantize(MODEL, own, scheme=scheme)
    return foreign, own


def logits(model: Any) -> torch.Tensor:
    """Return the logits of some tokens."""
    ids = torch.randint(3, 2000, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found.float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_g32", "w8a16"])
def test_transformers_runs_compressed_tensors(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("compressed_tensors", reason="the library of compressed-tensors")
    foreign, own = written(tmp_path, "compressed_tensors", scheme)
    model = AutoModelForCausalLM.from_pretrained(foreign, dtype=torch.float32)
    assert distance(logits(model), logits(load_model(own))) < NEAR


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("w4a16_asym", "pack-quantized"),
        ("w4a16_g32_asym", "pack-quantized"),
        ("w8a8_dynamic", "int-quantized"),
    ],
)
def test_compressed_tensors_decompresses_layers(tmp_path: Path, scheme: str, layout: str) -> None:
    """Layer by layer: with packed zero points no model loads, since version 0.20 of the library
    gives them another shape than it writes where it builds a model without weights."""
    pytest.importorskip("compressed_tensors", reason="the library of compressed-tensors")
    base = pytest.importorskip(
        "compressed_tensors.compressors.base", reason="compressors without a model"
    )
    from compressed_tensors.quantization import QuantizationScheme

    foreign, own = written(tmp_path, "compressed_tensors", scheme)
    checkpoint = open_checkpoint(foreign)
    config = checkpoint.config["quantization_config"]
    (group,) = config["config_groups"].values()
    inside = f"{LAYER}."
    tensors = {
        name.removeprefix(inside): from_numpy(checkpoint.load(name))
        for name in checkpoint.tensors
        if name.startswith(inside)
    }
    tensors["weight_scale"] = tensors["weight_scale"].float()
    compressor = base.BaseCompressor.get_value_from_registry(layout)
    found = compressor.decompress(tensors, QuantizationScheme(**group))["weight"]
    assert LAYER in group["targets"]
    assert distance(found, weight_of(own)) < 2**-8  # the scales are bfloat16


def weight_of(directory: Path) -> torch.Tensor:
    """Return the dequantized weight of a layer in the format of Ascend."""
    layer = as_torch(QuantizedCheckpoint(directory).layer(LAYER))
    codes = split_groups(layer.codes.float(), layer.scheme.group_size or layer.codes.shape[1])
    scale, offset = (
        x.reshape(*codes.shape[:2], 1) for x in (layer.weight_scale, layer.weight_offset)
    )
    return ((codes - offset) * scale).reshape(layer.codes.shape)


# GPTQModel leaves a temporary directory to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("form", "scheme", "dtype"),
    [
        ("gptq", "w4a16_g32", torch.float16),
        ("gptq", "w4a16_g32_asym", torch.float16),
        ("gptq", "w8a16", torch.float16),
        ("awq", "w4a16_g32", torch.float32),
        ("awq", "w4a16_g32_asym", torch.float32),
    ],
)
def test_gptqmodel_runs_its_formats(
    tmp_path: Path, form: str, scheme: str, dtype: torch.dtype
) -> None:
    peer = pytest.importorskip("gptqmodel", reason="reads the layouts of GPTQ and AWQ")
    foreign, own = written(tmp_path, form, scheme)
    backend = peer.BACKEND.GPTQ_TORCH if form == "gptq" else peer.BACKEND.AUTO
    model = peer.GPTQModel.load(str(foreign), backend=backend, device="cpu", dtype=dtype)
    assert distance(logits(model.model), logits(load_model(own))) < NEAR


def test_a_format_says_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="awq"):
        quantize(MODEL, tmp_path / "out", scheme="w8a16", format="awq")
    assert not (tmp_path / "out").exists()

"""What other projects read out of checkpoints in their formats, with their own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from slim_core.errors import SlimError
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_ptq import modules, quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.load import load_model

MODEL = Path(__file__).parents[3] / "examples" / "tiny-llama"
VARIANTS = ("", "_asym", "_g32", "_g32_asym")

# What is left is the rounding of scales to the dtype of the format.  The 4-bit model itself is 12 %
# away from the float one.
NEAR = {"bfloat16": 0.01, "float16": 0.002}


def written(
    root: Path, form: str, scheme: str, data: TokenWindows | None = None
) -> tuple[Path, Path]:
    """Write the same integers, -8 among those of 4 bits, for another tool and for Ascend."""
    foreign, own = root / form, root / "ascend"
    for output, name in ((foreign, form), (own, "ascend_v1")):
        recipe = Recipe.build(scheme=scheme, format=name, method="clip")
        quantize(MODEL, output, recipe=recipe, calibration=data)
    checkpoint = QuantizedCheckpoint(own)
    lowest = min(int(checkpoint.layer(layer).codes.min()) for layer in checkpoint.layers)
    assert lowest == (-8 if scheme.startswith("w4") else -128 if "asym" in scheme else -127)
    return foreign, own


def tokens() -> torch.Tensor:
    """Return windows of random tokens."""
    return torch.randint(3, 2000, (2, 48), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    """Return the logits of some tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(tokens()).logits
    return found.float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((found - expected).norm() / expected.norm())


def agree(what: str, theirs: Any, own: Path, limit: float) -> None:
    """Require that the logits of a model are near those of ours, and print how near."""
    found = distance(logits(theirs), logits(load_model(own)))
    print(f"\n{what}: {found:.5f}")  # `nox -s peers -- -s` shows it
    assert found < limit


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # to set one option of it
@pytest.mark.parametrize("scheme", [f"w{bits}a16{rest}" for bits in (4, 8) for rest in VARIANTS])
def test_transformers_runs_compressed_tensors(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("compressed_tensors", reason="the library of compressed-tensors")
    foreign, own = written(tmp_path, "compressed_tensors", scheme)
    # Without `dequantize`, transformers 5.23 loads no packed zero points, whoever wrote them.
    config = CompressedTensorsConfig(dequantize=scheme.endswith("_asym"))
    model = AutoModelForCausalLM.from_pretrained(
        foreign, dtype=torch.float32, quantization_config=config
    )
    agree(f"compressed_tensors {scheme}", model, own, NEAR["bfloat16"])


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_dynamic"])
def test_int8_activations_of_compressed_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Layers on the same inputs; in the whole model a rounding that falls to the other side of a
    half moves all that follows.  For dynamic activations the library divides by 127.5 where
    engines, and we, divide by 127."""
    pytest.importorskip("compressed_tensors", reason="the library of compressed-tensors")
    windows = TokenWindows(tuple(tokens().split(1)), "random tokens")
    foreign, own = written(tmp_path, "compressed_tensors", scheme, windows)
    theirs = AutoModelForCausalLM.from_pretrained(foreign, dtype=torch.float32)
    agree(f"compressed_tensors {scheme}", theirs, own, 0.02)  # the call decompresses the weights
    ours = load_model(own)

    def quantize_per_token(x: torch.Tensor, _dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127), scale

    monkeypatch.setattr(modules, "quantize_per_token", quantize_per_token)
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, modules.FakeQuantLinear)}
    assert len(layers) == 28
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        x = torch.randn(2, 20, layer.in_features, generator=generator)
        with torch.no_grad():
            assert distance(theirs.get_submodule(name)(x), layer(x)) < 1e-5, name


# GPTQModel leaves a temporary directory to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        *(("gptq", f"w{bits}a16{rest}") for bits in (4, 8) for rest in VARIANTS),
        *(("awq", f"w4a16{rest}") for rest in VARIANTS),
    ],
)
def test_gptqmodel_runs_its_formats(tmp_path: Path, form: str, scheme: str) -> None:
    """With its kernels in plain torch; the others for CPUs take groups of 32 and more only."""
    peer = pytest.importorskip("gptqmodel", reason="reads the layouts of GPTQ and AWQ")
    foreign, own = written(tmp_path, form, scheme)
    backend = peer.BACKEND.GPTQ_TORCH if form == "gptq" else peer.BACKEND.AWQ_TORCH
    model = peer.GPTQModel.load(str(foreign), backend=backend, device="cpu", dtype=torch.float16)
    agree(f"{form} {scheme}", model.model, own, NEAR["float16"])


def test_a_format_says_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="awq"):
        quantize(MODEL, tmp_path / "out", scheme="w8a16", format="awq")
    assert not (tmp_path / "out").exists()

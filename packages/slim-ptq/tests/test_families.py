"""Every family through every scheme: from a saved model to logits of the quantized directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slim_core.checkpoint import open_checkpoint
from slim_core.groups import is_expert
from slim_core.quantized import QuantizedCheckpoint
from slim_core.verify import verify_checkpoint
from slim_ptq import Calibrator, QuantConfig, load_model, quantize
from slim_ptq.calibration.text import TokenWindows

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "glm", "phi3", "phi", "gpt2"),
    *("gpt_neox", "bloom", "falcon", "opt", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"),
    "chatglm",
)
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
SCHEMES = ("w8a8", "w8a8_dynamic", "w8a16", "w8a16_g32")
# Random experts are chosen by tiny margins, so quantization can route a token elsewhere.
LIMITS = {"w8a8": 0.08, "w8a8_dynamic": 0.05, "w8a16": 0.03, "w8a16_g32": 0.03}


@pytest.fixture(scope="module")
def data(tiny_ids: Callable[..., torch.Tensor]) -> TokenWindows:
    return TokenWindows((tiny_ids(20, seed=1, batch=3), tiny_ids(20, seed=2, batch=1)), "ids")


def settings(family: str) -> dict[str, Any]:
    # 48 channels of the shared expert do not divide into groups of 32.
    return {"shared_expert_intermediate_size": 64} if family == "qwen2_moe" else {}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def run(
    saved_model: Callable[..., Path],
    data: TokenWindows,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Path]:
    """Quantize a family once for each scheme."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, scheme: str) -> Path:
        if (family, scheme) not in made:
            target = tmp_path_factory.mktemp("out") / "quantized"
            quantize(
                saved_model(family, **settings(family)),
                target,
                scheme=scheme,
                calibration=data if scheme == "w8a8" else None,
                trust_remote_code=family == "chatglm",
            )
            made[family, scheme] = target
        return made[family, scheme]

    return make


def test_every_family_is_here(families: tuple[str, ...]) -> None:
    assert set(families) == set(FAMILIES)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_saved_model_to_logits(
    run: Callable[[str, str], Path],
    saved_model: Callable[..., Path],
    tiny_model: Callable[..., Any],
    tiny_ids: Callable[..., torch.Tensor],
    family: str,
    scheme: str,
) -> None:
    source, target = saved_model(family, **settings(family)), run(family, scheme)
    found = verify_checkpoint(target)
    assert found.problems == ()
    assert found.layers > 0

    before, after = open_checkpoint(source), open_checkpoint(target)
    assert before.tensors.keys() <= after.tensors.keys()  # the names that save_pretrained gave
    stored = QuantizedCheckpoint(target)
    suffixes = {"weight_scale", "weight_offset"}
    if scheme == "w8a8":
        suffixes |= {"input_scale", "input_offset", "deq_scale", "quant_bias"}
    for name in after.tensors.keys() - before.tensors.keys():
        layer, _, local = name.rpartition(".")
        assert layer in stored.layers
        assert local in suffixes

    ids = tiny_ids(20, seed=1, batch=3)
    expected = logits(tiny_model(family, **settings(family)), ids)
    quantized = load_model(target, trust_remote_code=family == "chatglm")
    got = logits(quantized, ids)
    assert bool(torch.isfinite(got).all())
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < LIMITS[scheme]
    assert float(error.median()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_both_faces_give_the_same_weights(
    run: Callable[[str, str], Path],
    tiny_model: Callable[..., Any],
    data: TokenWindows,
    tmp_path: Path,
    family: str,
) -> None:
    modern = QuantizedCheckpoint(run(family, "w8a8"))
    model = tiny_model(family, **settings(family))
    samples = [[row.unsqueeze(0)] for batch in data.batches for row in batch]
    calibrator = Calibrator(model, QuantConfig(mm_tensor=False), samples)
    calibrator.run()
    calibrator.save(str(tmp_path / "classic"), save_type=["ascendV1"])
    classic = QuantizedCheckpoint(tmp_path / "classic")
    # The classic interface has a mixture of its own for DeepSeek.
    per_token = [name for name in modern.layers if family == "deepseek_v3" and ".mlp." in name]
    assert classic.layers == modern.layers | dict.fromkeys(per_token, "W8A8_DYNAMIC")
    for name, kind in classic.layers.items():
        one, other = classic.tensors_of(name), modern.tensors_of(name)
        assert one.keys() == other.keys() or name in per_token
        np.testing.assert_array_equal(one["weight"], other["weight"])
        np.testing.assert_array_equal(one["weight_scale"], other["weight_scale"])
        if kind == "W8A8":
            # The classic face lets later layers see the noise of earlier ones.
            np.testing.assert_allclose(one["input_scale"], other["input_scale"], rtol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_token_weights_are_the_same_in_both_pipelines(
    saved_model: Callable[..., Path],
    run: Callable[[str, str], Path],
    data: TokenWindows,
    tmp_path: Path,
    family: str,
) -> None:
    from slim_core.recipe import Recipe

    source = saved_model(family, **settings(family))
    streamed = QuantizedCheckpoint(run(family, "w8a8_dynamic"))
    quantize(
        source,
        tmp_path / "blockwise",
        # Falling back asks for the model to run; the one layer that stays in float is left out.
        recipe=Recipe.build(scheme="w8a8_dynamic", fallback=1),
        calibration=data,
        trust_remote_code=family == "chatglm",
    )
    blockwise = QuantizedCheckpoint(tmp_path / "blockwise")
    assert 0 < len(blockwise.layers) < len(streamed.layers)
    for name in blockwise.layers:
        one, other = blockwise.tensors_of(name), streamed.tensors_of(name)
        assert one.keys() == other.keys()
        for local in one:
            np.testing.assert_array_equal(one[local], other[local])
    floats = open_checkpoint(source)
    for name, info in blockwise.checkpoint.tensors.items():
        if blockwise.description[name] == "FLOAT":
            assert info.dtype == floats.tensors[name].dtype
            np.testing.assert_array_equal(blockwise.checkpoint.load(name), floats.load(name))


@pytest.mark.parametrize("family", MOE)
def test_experts_are_per_token_and_routers_float(
    run: Callable[[str, str], Path], family: str
) -> None:
    stored = QuantizedCheckpoint(run(family, "w8a8"))
    experts = {name: kind for name, kind in stored.layers.items() if is_expert(name)}
    assert len({name.split(".experts.")[1].split(".")[0] for name in experts}) >= 4
    assert set(experts.values()) == {"W8A8_DYNAMIC"}
    assert "W8A8" in set(stored.layers.values())
    routers = [
        name
        for name in stored.description
        if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))
    ]
    assert routers
    assert {stored.description[name] for name in routers} == {"FLOAT"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
def test_layers_of_one_matrix_share_their_input_parameters(
    run: Callable[[str, str], Path], family: str
) -> None:
    stored = QuantizedCheckpoint(run(family, "w8a8"))
    for index in range(2):
        base = f"model.layers.{index}.self_attn"
        shared = {
            (float(tensors["input_scale"][0]), float(tensors["input_offset"][0]))
            for tensors in (stored.tensors_of(f"{base}.{part}_proj") for part in "qkv")
        }
        assert len(shared) == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "bloom", "gpt2"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_a_tied_head_is_described_and_not_stored_again(
    saved_model: Callable[..., Path],
    tiny_model: Callable[..., Any],
    tiny_ids: Callable[..., torch.Tensor],
    data: TokenWindows,
    tmp_path: Path,
    family: str,
    scheme: str,
) -> None:
    source = saved_model(family, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(source).tensors
    quantize(source, tmp_path / "out", scheme=scheme, calibration=data)
    stored = QuantizedCheckpoint(tmp_path / "out")
    assert "lm_head.weight" not in stored.checkpoint.tensors
    assert stored.description["lm_head.weight"] == "FLOAT"
    assert verify_checkpoint(tmp_path / "out").sound
    ids = tiny_ids(20, seed=1, batch=3)
    expected = logits(tiny_model(family, tie_word_embeddings=True), ids)
    got = logits(load_model(tmp_path / "out"), ids)
    assert float((got - expected).norm() / expected.norm()) < LIMITS[scheme]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tied_head_of_the_classic_face(
    tiny_model: Callable[..., Any],
    tiny_calib: list[list[torch.Tensor]],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    model = tiny_model("llama", dtype=dtype, tie_word_embeddings=True)
    calibrator = Calibrator(model, QuantConfig(mm_tensor=False), tiny_calib)
    calibrator.run()
    calibrator.save(str(tmp_path / "out"), save_type=["ascendV1"])
    stored = QuantizedCheckpoint(tmp_path / "out")
    assert "lm_head.weight" not in stored.checkpoint.tensors
    assert stored.description["lm_head.weight"] == "FLOAT"


def test_saved_buffers_take_part(
    tiny_model: Callable[..., Any], tiny_ids: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model = tiny_model("deepseek_v3")
    buffers = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert buffers
    for buffer in buffers.values():
        buffer.copy_(torch.linspace(-2, 2, buffer.numel()))
    model.save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", scheme="w8a16")
    loaded = dict(load_model(tmp_path / "out").named_buffers())
    for name, buffer in buffers.items():
        assert torch.equal(loaded[name], buffer)

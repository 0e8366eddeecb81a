"""Tests of the two pipelines: memory, determinism, ranges, smoothing, fallback, dtypes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slim_core.checkpoint import Checkpoint, open_checkpoint
from slim_core.errors import CheckpointError, StructureError
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import ObserverKind, Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import load_model, quantize
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.inventory import inventory_by_names, take_inventory
from slim_ptq.pipeline.blocks import BlockRunner

Factory = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tiny_ids: Factory) -> TokenWindows:
    return TokenWindows((tiny_ids(16, seed=1, batch=2), tiny_ids(16, seed=2, batch=2)), "ids")


def files(directory: Path) -> dict[str, bytes]:
    """Return what must be the same in two runs: all but the report, which holds times."""
    return {
        file.name: file.read_bytes()
        for file in directory.iterdir()
        if not file.name.startswith("slim_report")
    }


class TestMemory:
    def test_blockwise_holds_one_block(
        self,
        saved_model: Factory,
        data: TokenWindows,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        load = BlockRunner._load
        peak = 0

        def watched(self: BlockRunner, module: nn.Module, path: str, **options: Any) -> None:
            nonlocal peak
            load(self, module, path, **options)
            held = (p for p in self._model.parameters() if not p.is_meta)
            peak = max(peak, sum(p.numel() * p.element_size() for p in held))

        monkeypatch.setattr(BlockRunner, "_load", watched)
        peaks = []
        for depth in (2, 4, 8):
            peak = 0
            source = saved_model("llama", num_hidden_layers=depth)
            quantize(source, tmp_path / str(depth), calibration=data)
            peaks.append(peak)
        embedding, block = 128 * 64 * 4, (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) * 4
        assert peaks == [embedding + block] * 3

    @pytest.mark.parametrize("scheme", ["w8a16", "w8a8_dynamic"])
    def test_weights_only_holds_a_few_tensors(
        self, saved_model: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
    ) -> None:
        load = Checkpoint.load
        alive = peak = 0

        def forget(size: int) -> None:
            nonlocal alive
            alive -= size

        def watched(self: Checkpoint, name: str) -> np.ndarray:
            nonlocal alive, peak
            array = load(self, name)
            alive += array.nbytes
            peak = max(peak, alive)
            weakref.finalize(array, forget, array.nbytes)
            return array

        monkeypatch.setattr(Checkpoint, "load", watched)
        # verification reads the result again, tensor by tensor, and is watched too
        peaks = []
        for depth in (2, 8):
            peak = 0
            quantize(
                saved_model("llama", num_hidden_layers=depth), tmp_path / str(depth), scheme=scheme
            )
            peaks.append(peak)
        largest = 128 * 64 * 4
        assert max(peaks) <= 4 * largest

    def test_no_pipeline_leaves_parameters_behind(
        self, saved_model: Factory, data: TokenWindows
    ) -> None:
        checkpoint = open_checkpoint(saved_model("llama"))
        inventory = take_inventory(checkpoint)
        runner = BlockRunner(checkpoint, inventory, data, CPU)
        with runner.loaded(1) as block:
            assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for parameter in inventory.model.parameters())


class TestDeterminism:
    @pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
    @pytest.mark.parametrize(
        "recipe",
        [
            {"scheme": "w8a8"},
            {"scheme": "w8a16_g32"},
            {"scheme": "w8a8", "smooth": {"alpha": 0.6}, "fallback": 1, "observer": "auto"},
        ],
    )
    def test_same_input_same_bytes(
        self,
        saved_model: Factory,
        data: TokenWindows,
        tmp_path: Path,
        family: str,
        recipe: dict[str, Any],
    ) -> None:
        for name in ("one", "two"):
            quantize(
                saved_model(family),
                tmp_path / name,
                recipe=Recipe.build(**recipe),
                calibration=data,
            )
        one, two = files(tmp_path / "one"), files(tmp_path / "two")
        assert one.keys() == two.keys()
        assert {name for name in one if one[name] != two[name]} == set()

    def test_the_order_of_rows_in_batches_does_not_count(
        self, saved_model: Factory, tiny_ids: Factory, tmp_path: Path
    ) -> None:
        rows = tiny_ids(16, seed=3, batch=4)
        for family in ("llama", "chatglm", "qwen2_moe"):
            scales = []
            for batch in (1, 4):
                out = tmp_path / f"{family}{batch}"
                quantize(
                    saved_model(family),
                    out,
                    calibration=TokenWindows(rows.split(batch), "ids"),
                    trust_remote_code=family == "chatglm",
                )
                stored = QuantizedCheckpoint(out).checkpoint
                scales.append(
                    {n: float(stored.load(n)[0]) for n in stored.tensors if "input_scale" in n}
                )
            assert scales[0] == pytest.approx(scales[1], rel=1e-4)


class TestRanges:
    def test_of_every_layer_against_hooks_on_the_float_model(
        self, saved_model: Factory, tiny_model: Factory, data: TokenWindows, tmp_path: Path
    ) -> None:
        model = tiny_model("qwen2")
        seen: dict[str, list[tuple[float, float]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                seen[name] = []
                module.register_forward_pre_hook(
                    lambda _m, x, name=name: seen[name].append(
                        (float(x[0].min()), float(x[0].max()))
                    )
                )
        with torch.no_grad():
            for batch in data.batches:
                for row in batch:
                    model(row.unsqueeze(0))
        quantize(saved_model("qwen2"), tmp_path / "mean", calibration=data)
        quantize(
            saved_model("qwen2"),
            tmp_path / "full",
            recipe=Recipe.build(observer=ObserverKind.MINMAX),
            calibration=data,
        )
        mean, full = (QuantizedCheckpoint(tmp_path / name) for name in ("mean", "full"))
        assert mean.layers.keys() == seen.keys()
        for name, pairs in seen.items():
            lows, highs = zip(*pairs, strict=True)
            average = (sum(highs) - sum(lows)) / len(pairs) / 255
            extreme = (max(highs) - min(lows)) / 255
            assert float(mean.layer(name).input_scale[0]) == pytest.approx(average, rel=1e-4)
            assert float(full.layer(name).input_scale[0]) == pytest.approx(extreme, rel=1e-4)

    @pytest.mark.parametrize("kind", list(ObserverKind))
    def test_every_observer_gives_a_sound_checkpoint(
        self, saved_model: Factory, data: TokenWindows, tmp_path: Path, kind: ObserverKind
    ) -> None:
        recipe = Recipe.build(observer=kind)
        report = quantize(saved_model("llama"), tmp_path / "out", recipe=recipe, calibration=data)
        assert verify_checkpoint(tmp_path / "out").sound
        errors = [layer.output_error for layer in report.layers]
        assert all(error is not None and 0 < error < 0.2 for error in errors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_half_precision_checkpoints(
    saved_model: Factory, data: TokenWindows, tmp_path: Path, dtype: torch.dtype, scheme: str
) -> None:
    source = saved_model("qwen2", dtype=dtype)
    quantize(source, tmp_path / "out", scheme=scheme, calibration=data)
    assert verify_checkpoint(tmp_path / "out").problems == ()
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    layer = "model.layers.0.self_attn.q_proj"
    assert after.tensors[f"{layer}.bias"].dtype == before.tensors[f"{layer}.bias"].dtype
    assert after.tensors["lm_head.weight"].dtype == before.tensors["lm_head.weight"].dtype
    if scheme == "w8a8":
        stored = after.tensors[f"{layer}.deq_scale"].dtype
        assert stored == (np.float32 if dtype == torch.bfloat16 else np.int64)
        scale = torch.from_numpy(after.load(f"{layer}.input_scale"))
        assert torch.equal(scale, scale.to(dtype).float())


def test_smoothing_keeps_the_float_model_and_helps_planted_outliers(
    tiny_model: Factory,
    tiny_ids: Factory,
    plant_outliers: Callable[..., None],
    data: TokenWindows,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        plant_outliers(layer.input_layernorm, readers, [3, 17], 60.0)
    model.save_pretrained(tmp_path / "model")
    errors = {}
    ids = tiny_ids(16, seed=1, batch=2)
    with torch.no_grad():
        expected = model(ids).logits
        for name, smooth in (("plain", None), ("smooth", {"alpha": 0.5})):
            recipe = Recipe.build(smooth=smooth)
            quantize(tmp_path / "model", tmp_path / name, recipe=recipe, calibration=data)
            assert verify_checkpoint(tmp_path / name).problems == ()
            found = load_model(tmp_path / name)(ids).logits
            errors[name] = float((found - expected).norm() / expected.norm())
    assert errors["smooth"] < 0.5 * errors["plain"]


def test_fallback_is_an_entry_of_the_report(
    saved_model: Factory, data: TokenWindows, tmp_path: Path
) -> None:
    recipe = Recipe.build(fallback=2)
    report = quantize(saved_model("llama"), tmp_path / "out", recipe=recipe, calibration=data)
    floats = {layer.name for layer in report.layers if layer.scheme == "float"}
    assert len(floats) >= 2
    assert floats == {name for name, _ in report.fallbacks}
    assert all("range_param" in reason for _, reason in report.fallbacks)
    stored = QuantizedCheckpoint(tmp_path / "out")
    assert not floats & stored.layers.keys()
    assert {stored.description[f"{name}.weight"] for name in floats} == {"FLOAT"}
    assert verify_checkpoint(tmp_path / "out").sound


class TestInventory:
    def test_by_names_finds_what_the_model_has(self, saved_model: Factory) -> None:
        for family in ("llama", "qwen2", "qwen3_moe", "gpt_neox"):
            checkpoint = open_checkpoint(saved_model(family))
            by_names = inventory_by_names(checkpoint).linears
            assert by_names == take_inventory(checkpoint).linears

    def test_a_model_that_transformers_lacks_streams_by_names(
        self, saved_model: Factory, data: TokenWindows, tmp_path: Path
    ) -> None:
        quantize(saved_model("chatglm"), tmp_path / "out", scheme="w8a16")  # code not trusted
        assert verify_checkpoint(tmp_path / "out").sound
        assert len(QuantizedCheckpoint(tmp_path / "out").layers) == 8
        with pytest.raises(StructureError):
            quantize(saved_model("chatglm"), tmp_path / "again", calibration=data)

    def test_conv1d_weights_are_given_as_out_in(self, saved_model: Factory) -> None:
        inventory = take_inventory(open_checkpoint(saved_model("gpt2")))
        name = "transformer.h.0.attn.c_attn"
        assert name in inventory.transposed
        assert inventory.linears[name] == (192, 64)

    def test_transposed_weights_are_stored_as_engines_read_them(
        self, saved_model: Factory, tiny_model: Factory, tmp_path: Path
    ) -> None:
        quantize(saved_model("gpt2"), tmp_path / "out", scheme="w8a16")
        name = "transformer.h.1.mlp.c_fc"
        layer = QuantizedCheckpoint(tmp_path / "out").layer(name)
        weight = tiny_model("gpt2").get_submodule(name).weight.detach().numpy().T
        assert layer.codes.shape == weight.shape
        assert np.abs(layer.dequantized() - weight).max() <= layer.weight_scale.max() / 2 * 1.001

    def test_no_linear_layer_is_an_error(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
        with pytest.raises(StructureError, match="looks like a linear layer"):
            inventory_by_names(open_checkpoint(tmp_path))
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            take_inventory(open_checkpoint(tmp_path))

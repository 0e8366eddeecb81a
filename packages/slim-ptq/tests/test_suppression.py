"""Outlier suppression from end to end: both interfaces, every method, shifts, and what is saved."""

from __future__ import annotations

import copy

import pytest
import torch

from slim_core.checkpoint import open_checkpoint
from slim_core.errors import PatternError, RecipeError, StructureError
from slim_core.quantized import QuantizedCheckpoint
from slim_core.recipe import Recipe
from slim_core.verify import verify_checkpoint
from slim_ptq import (
    AntiOutlier,
    AntiOutlierConfig,
    Calibrator,
    QuantConfig,
    dequantize,
    load_model,
    quantize,
)
from slim_ptq.calibration.text import TokenWindows
from slim_ptq.structure import LinkKind
from slim_ptq.transforms import smoothed_norms

NAMES = {
    "m1": "smoothquant",
    "m2": "threshold",
    "m3": "awq",
    "m4": "iterative",
    "m5": "cbq",
    "m6": "flex",
}
ATTENTION = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def windows(tiny_ids):
    return [tiny_ids(48, seed=100 + number) for number in range(6)]


@pytest.fixture(scope="module")
def samples(windows):
    return [[ids, torch.ones_like(ids)] for ids in windows]


@pytest.fixture(scope="module")
def data(windows):
    return TokenWindows(tuple(windows), "windows of the tests")


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def codes_of(directory):
    stored = QuantizedCheckpoint(directory)
    return {name: torch.from_numpy(stored.layer(name).codes) for name in stored.layers}


def process(model, samples, method, **config):
    anti = AntiOutlier(model, samples, AntiOutlierConfig(anti_method=method, **config))
    anti.process()
    return anti


@pytest.mark.parametrize(
    ("bits", "dynamic", "kind"), [(8, True, "w8a8_dynamic"), (16, False, "w8a16")]
)
def test_m3_scales_norms_by_the_power_of_the_mean_that_serves_their_readers(
    bits, dynamic, kind, tiny_model, samples
):
    before, model = tiny_model("qwen2"), tiny_model("qwen2")
    anti = process(model, samples, "m3", a_bit=bits, is_dynamic=dynamic)
    assert {item.kind for item in anti.result.scaled} == {LinkKind.NORM_LINEAR}
    ids = samples[0][0]
    torch.testing.assert_close(logits_of(model, ids), logits_of(before, ids), rtol=1e-4, atol=1e-5)
    seen = []
    norm = before.model.layers[0].input_layernorm
    handle = norm.register_forward_hook(lambda _module, _args, out: seen.append(out.flatten(0, 1)))
    for sample in samples:
        logits_of(before, sample[0])
    handle.remove()
    x, attention = torch.cat(seen), before.model.layers[0].self_attn
    weights = [getattr(attention, f"{name}_proj").weight.detach() for name in "qkv"]

    def error(scales):
        total = 0.0
        for weight in weights:
            moved, inputs = weight * scales, x / scales
            step = moved.abs().amax(dim=1, keepdim=True) / 127
            rounded = (moved / step).round() * step
            if kind == "w8a8_dynamic":
                token = inputs.abs().amax(dim=1, keepdim=True) / 127
                inputs = (inputs / token).round() * token
            exact = x @ weight.T
            total += float((inputs @ rounded.T - exact).square().sum() / exact.square().sum())
        return total

    mean = x.abs().mean(dim=0)
    powers = [mean ** (step / 20) for step in range(20)]
    candidates = [power / (power.max() * power.min()).sqrt() for power in powers]
    found = next(i.scales for i in anti.result.scaled if i.source.endswith("0.input_layernorm"))
    apart = [float((found.log() - other.log()).abs().max()) for other in candidates]
    assert min(apart) < 1e-3  # it is one of them
    # m3 compares on 256 of the 288 tokens: none of the others is much better on all.
    assert error(candidates[apart.index(min(apart))]) <= 1.005 * min(map(error, candidates))


# m3 is judged by the products of a link, as its contract says, awq of recipes by the block.
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_dynamic"])
@pytest.mark.parametrize("method", [name for name in NAMES if name != "m3"])
def test_both_interfaces_give_the_same_integers(
    method, scheme, tiny_model, saved_model, samples, data, tmp_path
):
    dynamic = scheme == "w8a8_dynamic"
    model = tiny_model("qwen2")
    process(model, samples, method, is_dynamic=dynamic)
    config = QuantConfig(mm_tensor=False, is_dynamic=dynamic)
    calibrator = Calibrator(model, config, samples)
    calibrator.run()
    calibrator.save(str(tmp_path / "classic"), save_type=["ascendV1"])
    model.config.save_pretrained(tmp_path / "classic")
    recipe = Recipe.build(scheme=scheme, smooth=NAMES[method])
    quantize(saved_model("qwen2"), tmp_path / "modern", recipe=recipe, calibration=data)
    classic, modern = codes_of(tmp_path / "classic"), codes_of(tmp_path / "modern")
    assert classic.keys() == modern.keys()
    for name, codes in classic.items():
        assert torch.equal(codes, modern[name]), name


def test_m4_and_m6_scale_by_their_formulas_over_every_link(tiny_model, samples, tiny_ids):
    for method, (alpha, beta), reduce in (
        ("m4", (0.9, 0.1), "mean"),
        ("m6", (0.75, 0.1), "max"),
    ):
        model, before = tiny_model("llama"), tiny_model("llama")
        inputs = inputs_of(before, samples)
        process(model, samples, method, flex_config={"alpha": 0.75, "beta": 0.1})
        ids = tiny_ids(30, seed=9)
        torch.testing.assert_close(logits_of(model, ids), logits_of(before, ids), rtol=0, atol=1e-5)
        new, old = model.model.layers[0], before.model.layers[0]
        for part, readers in (("self_attn", ATTENTION), ("mlp", ("gate_proj", "up_proj"))):
            columns = torch.stack([column_peaks(old, part, name) for name in readers]).amax(0)
            expected = inputs[f"{part}.{readers[0]}"] ** alpha / columns**beta
            for name in readers:
                if name in ("v_proj", "up_proj"):
                    continue  # whose rows are scaled as well
                assert_ratio(new, old, part, name, expected)
        down = inputs["mlp.down_proj"] ** alpha / column_peaks(old, "mlp", "down_proj") ** beta
        assert_ratio(new, old, "mlp", "down_proj", down)
        peaks, columns = inputs["self_attn.o_proj"], column_peaks(old, "self_attn", "o_proj")
        if reduce == "max":  # two query heads of 16 channels share a value head
            peaks, columns = (x.reshape(2, 2, 16).amax(1) for x in (peaks, columns))
            value = peaks**alpha / columns**beta
        else:
            value = (peaks**alpha / columns**beta).reshape(2, 2, 16).mean(1)
        shared = value[:, None].expand(2, 2, 16).reshape(-1)
        assert_ratio(new, old, "self_attn", "o_proj", shared)


def inputs_of(model, samples):
    """Largest magnitude of each input channel of the linear layers of the first block."""
    seen = {}

    def hook(name):
        def keep(module, args):
            peak = args[0].detach().reshape(-1, args[0].shape[-1]).abs().amax(0)
            seen[name] = torch.maximum(seen[name], peak) if name in seen else peak

        return keep

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    for ids, _ in samples:
        logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def column_peaks(layer, part, name):
    return layer.get_submodule(f"{part}.{name}").weight.detach().abs().amax(0)


def assert_ratio(new, old, part, name, expected):
    ratio = new.get_submodule(f"{part}.{name}").weight / old.get_submodule(f"{part}.{name}").weight
    torch.testing.assert_close(ratio[1], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["m1", "m6"])
def test_saved_norms_have_the_entries_of_their_method(method, tiny_model, samples, tmp_path):
    model = tiny_model("llama")
    process(model, samples, method)
    calibrator = Calibrator(model, QuantConfig(mm_tensor=False), samples)
    calibrator.run()
    norm = "model.layers.0.input_layernorm"
    for kind, wrapped in (
        ("safe_tensor", {"weight", "bias", "module.weight", "module.bias"}),
        ("ascendV1", {"weight", "bias"}),
    ):
        calibrator.save(str(tmp_path / kind), save_type=[kind])
        names = open_checkpoint(tmp_path / kind).tensors
        found = {name.removeprefix(f"{norm}.") for name in names if name.startswith(f"{norm}.")}
        assert found == (wrapped if method == "m1" else {"weight"})


@pytest.mark.parametrize("kind", ["ascend_v1", "safe_tensor"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_shifted_model_is_read_back_as_it_was(
    family, kind, tiny_model, saved_model, samples, data, tiny_ids, tmp_path
):
    ids = tiny_ids(30, seed=9)
    expected = logits_of(tiny_model(family), ids)
    smooth = {"method": "iterative", "shift": True}
    recipe = Recipe.build(smooth=smooth, format=kind)
    quantize(saved_model(family), tmp_path / "modern", recipe=recipe, calibration=data)
    model = tiny_model(family)
    process(model, samples, "m4", shift=True)
    assert len(smoothed_norms(model)) == 4
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    calibrator = Calibrator(model, QuantConfig(mm_tensor=False), samples)
    calibrator.run()
    saved = "ascendV1" if kind == "ascend_v1" else kind
    calibrator.save(str(tmp_path / "classic"), save_type=[saved])
    model.config.save_pretrained(tmp_path / "classic")
    assert verify_checkpoint(tmp_path / "classic").problems == ()
    found = logits_of(load_model(tmp_path / "classic"), ids)
    torch.testing.assert_close(found, logits_of(calibrator.model, ids), rtol=0, atol=1e-5)
    modern = logits_of(load_model(tmp_path / "modern"), ids)
    for other in (found, modern):
        assert float((other - expected).norm() / expected.norm()) < 0.3
    classic = open_checkpoint(tmp_path / "classic")
    written = open_checkpoint(tmp_path / "modern")
    assert classic.tensors.keys() == written.tensors.keys()
    for name in classic.tensors:
        if name.endswith((".weight", ".bias")):
            ours, theirs = (torch.from_numpy(x.load(name)) for x in (classic, written))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def test_a_shifted_model_has_no_float_form(tiny_model, saved_model, samples, data, tmp_path):
    model = tiny_model("llama")
    anti = process(model, samples, "m4", shift=True)
    with pytest.raises(StructureError, match=r"LlamaForCausalLM has no bias in model\.layers\.0"):
        anti.save_model(str(tmp_path / "saved"))
    recipe = Recipe.build(smooth={"method": "iterative", "shift": True}, format="float")
    quantize(saved_model("llama"), tmp_path / "float", recipe=recipe, calibration=data)
    before = open_checkpoint(saved_model("llama")).tensors
    assert open_checkpoint(tmp_path / "float").tensors.keys() == before.keys()


def test_a_shift_that_engines_may_drop_is_said(tiny_model, samples, caplog):
    model = tiny_model("llama")
    process(model, samples, "m4", shift=True)
    Calibrator(model, QuantConfig(mm_tensor=False, is_dynamic=True), samples)
    assert "q_proj is w8a8_dynamic and makes up for a shift in a bias" in caplog.text


def test_excluded_layers_keep_their_links(saved_model, data, tmp_path, caplog):
    smooth = {"method": "iterative", "exclude": ["*.0.self_attn.q_proj"]}
    for name, values in (("one", smooth), ("none", None)):
        recipe = Recipe.build(smooth=values)
        quantize(saved_model("llama"), tmp_path / name, recipe=recipe, calibration=data)
    one, none = (QuantizedCheckpoint(tmp_path / name) for name in ("one", "none"))
    layer = "model.layers.0.self_attn.q_proj"
    assert (one.layer(layer).codes == none.layer(layer).codes).all()
    other = "model.layers.1.self_attn.q_proj"
    assert (one.layer(other).codes != none.layer(other).codes).any()
    assert f"input_layernorm: {layer} is in smooth.exclude" in caplog.text


def test_a_pattern_without_a_layer_is_an_error_before_any_work(saved_model, data, tmp_path):
    recipe = Recipe.build(smooth={"method": "flex", "exclude": ["*.q_porj"]})
    with pytest.raises(PatternError, match=r"smooth\.exclude: no layer is called"):
        quantize(saved_model("llama"), tmp_path / "out", recipe=recipe, calibration=data)
    with pytest.raises(RecipeError, match=r"smooth\.method"):
        quantize(saved_model("llama"), tmp_path / "out", smooth="magic", calibration=data)
    assert not (tmp_path / "out").exists()


def test_norms_in_half_precision_are_made_up_for(saved_model, data, tmp_path):
    source = saved_model("llama", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", recipe=Recipe.build(smooth="iterative"), calibration=data)
    before, after = open_checkpoint(source), QuantizedCheckpoint(tmp_path / "out")
    layer = "model.layers.0.self_attn.q_proj"
    weight = torch.from_numpy(before.load(f"{layer}.weight").astype("float32"))
    found = torch.from_numpy(after.layer(layer).dequantized())
    norm = "model.layers.0.input_layernorm.weight"
    old, new = (x.load(norm).astype("float32") for x in (before, after.checkpoint))
    scales = torch.from_numpy(old / new)  # by which readers must have been multiplied, exactly
    moved = weight * scales
    step = moved.abs().amax(1, keepdim=True) / 127
    assert float(((found - moved).abs() / step).max()) <= 0.5 + 1e-3


def test_do_smooth_suppresses_planted_outliers(tiny_model, samples, tiny_ids, plant_outliers):
    errors = {}
    for smooth in (False, True):
        model, ids = tiny_model("llama"), tiny_ids(40, seed=3)
        expected = logits_of(model, ids)
        for layer in model.model.layers:
            readers = [getattr(layer.self_attn, name) for name in ATTENTION]
            plant_outliers(layer.input_layernorm, readers, [5, 40], 60.0)
        config = QuantConfig(is_lowbit=True, do_smooth=smooth, mm_tensor=False)
        calibrator = Calibrator(copy.deepcopy(model), config, samples)
        calibrator.run()
        found = logits_of(calibrator.model, ids)
        errors[smooth] = float((found - expected).norm() / expected.norm())
    assert errors[True] < 0.3 * errors[False]


def test_the_links_of_a_method_are_those_of_the_classic_interface():
    kinds = {name: AntiOutlierConfig(anti_method=name).method().kinds for name in NAMES}
    norms = {LinkKind.NORM_LINEAR}
    every = set(LinkKind)
    assert kinds == {
        "m1": norms,
        "m2": norms,
        "m3": norms,
        "m4": every,
        "m5": norms,
        "m6": every,
    }


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_smoothed_safe_tensor_checkpoint_becomes_a_float_one(
    family, tiny_model, saved_model, samples, tmp_path
):
    model = tiny_model(family)
    process(model, samples[:2], "m1")
    calibrator = Calibrator(model, QuantConfig(mm_tensor=False), samples[:2])
    calibrator.run()
    calibrator.save(str(tmp_path / "out"))
    model.config.save_pretrained(tmp_path / "out")
    dequantize(tmp_path / "out", tmp_path / "float")
    found = open_checkpoint(tmp_path / "float").tensors.keys()
    assert found == open_checkpoint(saved_model(family)).tensors.keys()

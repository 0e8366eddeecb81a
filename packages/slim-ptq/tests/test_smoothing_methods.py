"""What each method of outlier suppression chooses, and that no block notices."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from slim_core.errors import InvalidValueError
from slim_core.method import MethodSpec
from slim_core.recipe import Recipe, SmoothMethod
from slim_core.scheme import QuantScheme
from slim_ptq.methods import MinMax
from slim_ptq.modules import FakeQuantLinear
from slim_ptq.parallel import Team
from slim_ptq.structure import (
    Link,
    LinkKind,
    NormForm,
    Target,
    find_blocks,
    find_linears,
    trace_block,
    unfuse_experts,
)
from slim_ptq.transforms import (
    ALL_LINKS,
    AlphaSearch,
    AwqScale,
    BlockAwq,
    BlockData,
    BlockError,
    CbqSmooth,
    ChannelStats,
    FlexSmooth,
    IterativeSmooth,
    LinkStatistics,
    Reader,
    SmoothQuant,
    ThresholdSmooth,
    add_bias,
    scale_link,
    scale_method,
    suppress_block,
)
from slim_ptq.transforms.cbq import outlier_scales
from slim_ptq.transforms.error import LinkError

W8A8 = QuantScheme.parse("w8a8")
METHODS = [
    SmoothQuant(kinds=ALL_LINKS),
    ThresholdSmooth(kinds=ALL_LINKS),
    AwqScale(kinds=ALL_LINKS),
    IterativeSmooth(),
    IterativeSmooth(shift=True),
    CbqSmooth(kinds=ALL_LINKS),
    FlexSmooth(),
    FlexSmooth(0.75, 0.1),
    AlphaSearch(kinds=ALL_LINKS),
]


def run(block, args, kwargs):
    with torch.no_grad():
        out = block(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def norm_link(width):
    target = Target("reader", "weight", 1, torch.arange(width))
    return Link(LinkKind.NORM_LINEAR, "norm", (target,), width, NormForm.PLAIN, direct=True)


def statistics_of(x, tokens=256):
    stats = ChannelStats(tokens)
    stats.update(x)
    return stats


def random_case(width=32, outliers=(3, 17), seed=0):
    """Return a link, statistics and readers of an activation with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, width, generator=generator)
    weight = torch.randn(24, width, generator=generator) * 0.1
    x[:, list(outliers)] *= 50.0
    return norm_link(width), x, weight


def changes(original, links, method, args, kwargs):
    """Apply a method to a copy of a block; return what it did and by how much the output moved."""
    block = copy.deepcopy(original)
    with LinkStatistics(block, links, tokens=min(method.tokens, 16)) as statistics:
        expected = run(block, args, kwargs)
    schemes = dict.fromkeys(find_linears(block), W8A8)
    done, _ = suppress_block(block, links, statistics, method, schemes)
    error = (run(block, args, kwargs) - expected).abs().max() / expected.abs().max()
    return done, float(error)


def traced_block(model, capture_block, ids):
    unfuse_experts(model)
    name = find_blocks(model)[-1]
    args, kwargs = capture_block(model, name, ids)
    block = model.get_submodule(name)
    return block, trace_block(block, args, kwargs).links, args, kwargs


def test_no_block_of_any_family_notices_scales_and_shifts(
    families, tiny_model, capture_block, tiny_ids
):
    for family in families:
        block, links, *call = traced_block(tiny_model(family), capture_block, tiny_ids(12))
        done, error = changes(block, links, IterativeSmooth(shift=True), *call)
        assert {item.kind for item in done} >= {LinkKind.NORM_LINEAR, LinkKind.V_O}, family
        assert error < 2e-5, family
        assert any(item.shifted for item in done), family
        for item in done:
            said = item.shifted or bool(item.unshifted)
            assert said is (item.kind is LinkKind.NORM_LINEAR), family


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("family", ["llama", "gpt2", "chatglm", "mixtral"])
def test_no_block_notices_any_method(family, method, tiny_model, capture_block, tiny_ids):
    block, links, *call = traced_block(tiny_model(family), capture_block, tiny_ids(12))
    done, error = changes(block, links, method, *call)
    assert {item.kind for item in done} >= {LinkKind.NORM_LINEAR, LinkKind.V_O}
    assert error < 2e-5


def test_a_router_keeps_its_norm_from_being_shifted(tiny_model, capture_block, tiny_ids):
    model = tiny_model("qwen3_moe")
    unfuse_experts(model)
    block = model.model.layers[0]
    args, kwargs = capture_block(model, "model.layers.0", tiny_ids())
    links = trace_block(block, args, kwargs).links
    with LinkStatistics(block, links) as statistics:
        run(block, args, kwargs)
    schemes = dict.fromkeys(find_linears(block), W8A8)
    method = IterativeSmooth(shift=True)
    done = {i.source: i for i in suppress_block(block, links, statistics, method, schemes)[0]}
    assert done["input_layernorm"].shifted
    assert not done["post_attention_layernorm"].shifted
    assert (
        "does not read the output of the norm itself" in done["post_attention_layernorm"].unshifted
    )
    assert not done["self_attn.v_proj"].shifted


@pytest.mark.parametrize(
    ("scheme", "can_add", "reason"),
    [
        ("w8a8", True, ""),
        ("w8a8_dynamic", True, "has no bias, and w8a8_dynamic has no integer bias"),
        ("w8a16", True, "has no bias, and w8a16 has no integer bias"),
        ("w8a8", False, "input_layernorm has no bias, and the format has no place for one"),
    ],
)
def test_shifts_go_where_they_can_be_held(
    scheme, can_add, reason, tiny_model, capture_block, tiny_ids
):
    model = tiny_model("llama")
    block = model.model.layers[0]
    args, kwargs = capture_block(model, "model.layers.0", tiny_ids())
    links = trace_block(block, args, kwargs).links
    with LinkStatistics(block, links) as statistics:
        run(block, args, kwargs)
    schemes = dict.fromkeys(find_linears(block), QuantScheme.parse(scheme))
    method = IterativeSmooth(shift=True)
    done, _ = suppress_block(block, links, statistics, method, schemes, can_add=can_add)
    assert done[0].shifted is (reason == "")
    assert reason in done[0].unshifted
    assert (getattr(block.input_layernorm, "bias", None) is not None) is (reason == "")


def test_layers_with_biases_are_shifted_whatever_their_type(tiny_model, capture_block, tiny_ids):
    model = tiny_model("bloom")
    block = model.transformer.h[0]
    args, kwargs = capture_block(model, "transformer.h.0", tiny_ids())
    links = [x for x in trace_block(block, args, kwargs).links if x.kind is LinkKind.NORM_LINEAR]
    expected = run(block, args, kwargs)
    with LinkStatistics(block, links) as statistics:
        run(block, args, kwargs)
    schemes = dict.fromkeys(find_linears(block), QuantScheme.parse("w8a8_dynamic"))
    method = IterativeSmooth(shift=True)
    done, _ = suppress_block(block, links, statistics, method, schemes, can_add=False)
    assert all(item.shifted for item in done)
    torch.testing.assert_close(run(block, args, kwargs), expected, rtol=1e-5, atol=1e-5)
    with LinkStatistics(block, links) as after:
        run(block, args, kwargs)
    for source in after.of:
        torch.testing.assert_close(
            after.of[source].low, -after.of[source].high, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            statistics.of[source].high, after.of[source].high, rtol=1e-3, atol=1e-4
        )


def test_a_shift_in_half_precision_is_made_up_for_but_for_rounding():
    torch.manual_seed(0)
    block = nn.Sequential()
    block.norm, block.reader = nn.RMSNorm(64), nn.Linear(64, 32, bias=False)
    nn.init.uniform_(block.norm.weight, 0.5, 2.0)
    block.to(torch.bfloat16)
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    scales, shift = torch.rand(64) * 3 + 0.5, torch.randn(64)
    with torch.no_grad():
        expected = block(x).float()
        scale_link(block, norm_link(64), scales, shift)
        found = block(x).float()
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert block.norm.bias.dtype == block.reader.bias.dtype == torch.bfloat16


def test_a_shift_that_cannot_be_held_is_an_error():
    block = nn.Sequential()
    block.norm, block.reader = nn.RMSNorm(8), nn.Linear(8, 4, bias=False)
    with pytest.raises(InvalidValueError, match=r"the shift for norm must be finite and have"):
        scale_link(block, norm_link(8), torch.ones(8), torch.ones(7))
    target = Target("reader", "weight", 1, torch.arange(8))
    indirect = Link(LinkKind.NORM_LINEAR, "norm", (target,), 8, NormForm.PLAIN)
    with pytest.raises(InvalidValueError, match="the link from norm carries no shift"):
        scale_link(block, indirect, torch.ones(8), torch.ones(8))
    assert getattr(block.norm, "bias", None) is None


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8, False)]
)
def test_an_added_bias_is_added_once_and_survives_a_copy(norm):
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = norm(x) + torch.arange(8.0)
        add_bias(norm, torch.arange(8.0))
        torch.testing.assert_close(norm(x), expected)
        torch.testing.assert_close(copy.deepcopy(norm)(x), expected)


def test_m3_is_a_power_of_the_mean_over_all_tokens_that_no_other_beats():
    link, x, weight = random_case()
    readers = [Reader(weight, QuantScheme.parse("w8a16"))]
    stats = statistics_of(x)
    scales = AwqScale().scales(link, stats, readers)
    error = LinkError(link, stats, readers)
    mean = x.abs().mean(0)
    candidates = []
    for step in range(20):
        power = mean ** (step / 20)
        candidates.append(power / (power.max() * power.min()).sqrt())
    torch.testing.assert_close(scales, min(candidates, key=error))
    assert error(scales) < error(torch.ones(32))


class Kept:
    """Calibration data of a block: every argument is kept, as are its outputs."""

    index = 0

    def __init__(self, block, args, kwargs, batches):
        self.calls = [((batch, *args[1:]), kwargs) for batch in batches]
        self.targets = [run(block, *call) for call in self.calls]
        self.tokens = sum(batch.shape[:-1].numel() for batch in batches)

    def __len__(self):
        return len(self.calls)

    def run(self, block, batch):
        return run(block, *self.calls[batch])

    def target(self, batch):
        return self.targets[batch]


def block_data(model, capture_block, ids, method="minmax", batches=4):
    """Return a block with its links, their statistics, and data to judge it on."""
    block, links, args, kwargs = traced_block(model, capture_block, ids)
    torch.manual_seed(1)
    hidden = [
        args[0] + torch.randn_like(args[0]) * torch.rand(args[0].shape[-1]) for _ in range(batches)
    ]
    samples = Kept(block, args, kwargs, hidden)
    with LinkStatistics(block, links) as statistics:
        for batch in range(batches):
            samples.run(block, batch)
    return (
        block,
        links,
        statistics,
        BlockData(samples, dict.fromkeys(find_linears(block), MethodSpec(method))),
    )


def readers_of(block, link, scheme):
    linears = find_linears(block)
    return {
        name: Reader(linears[name].weight.detach(), scheme)
        for name in link.target_names
        if name in linears
    }


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_g16", "w8a8_dynamic"])
@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_the_block_error_is_that_of_the_block_with_quantized_readers(
    family, scheme, tiny_model, capture_block, tiny_ids
):
    kind = QuantScheme.parse(scheme)
    block, links, statistics, data = block_data(tiny_model(family), capture_block, tiny_ids(12))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    for link in links:
        readers = readers_of(block, link, kind)
        scales = torch.ones(link.width)
        scales[link.channels] = torch.rand(len(link.channels)) + 0.5
        error = BlockError(block, link, statistics.of[link.source], readers, data, 10**6)
        found = error(scales)
        moved = copy.deepcopy(block)
        scale_link(moved, link, scales)
        for name in readers:
            layer = find_linears(moved)[name]
            made = MinMax().quantize(name, layer.weight, kind.weight)
            bias = None if layer.bias is None else layer.bias.detach()
            fake = FakeQuantLinear(made.layer(name, kind, bias, "float32"), torch.float32)
            parent, _, leaf = name.rpartition(".")
            setattr(moved.get_submodule(parent), leaf, fake)
        samples = data.samples
        expected = sum(
            float((samples.run(moved, batch) - samples.target(batch)).square().sum())
            for batch in range(len(samples))
        )
        assert found == pytest.approx(expected, rel=2e-3), link.source
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_awq_by_block_takes_the_exponent_that_serves_the_block_best(
    family, tiny_model, capture_block, tiny_ids
):
    scheme = QuantScheme.parse("w4a16")
    block, links, statistics, data = block_data(tiny_model(family), capture_block, tiny_ids(12))
    for link in links:
        stats, readers = statistics.of[link.source], readers_of(block, link, scheme)
        error = BlockError(block, link, stats, readers, data, 10**6)
        mean = link.to_source(stats.mean_magnitude)[link.channels]
        tried = []
        for step in range(20):
            scales, power = torch.ones(link.width), mean ** (step / 20)
            scales[link.channels] = power / (power.max() * power.min()).sqrt()
            tried.append(scales)
        chosen = copy.deepcopy(block)
        schemes = dict.fromkeys(find_linears(block), scheme)
        one = copy.copy(statistics)
        one.of = dict(statistics.of)
        done, _ = suppress_block(chosen, [link], one, BlockAwq(), schemes, data=data)
        assert done[0].kind is link.kind
        torch.testing.assert_close(done[0].scales, min(tried, key=error), rtol=1e-5, atol=1e-6)
        assert error(done[0].scales) <= error(torch.ones(link.width))


def test_the_block_error_of_a_method_with_data_is_that_of_all_codes(
    tiny_model, capture_block, tiny_ids
):
    scheme = QuantScheme.parse("w4a16")
    block, links, statistics, data = block_data(tiny_model("llama"), capture_block, tiny_ids(12))
    link = links[0]
    found = []
    for spec in ("gptq", {"name": "minmax", "full_range": True}, "minmax", "clip"):
        methods = dict.fromkeys(data.methods, MethodSpec.parse(spec))
        of = dataclasses.replace(data, methods=methods)
        readers = readers_of(block, link, scheme)
        error = BlockError(block, link, statistics.of[link.source], readers, of, 10**6)
        found.append(error(torch.ones(link.width)))
    assert found[0] == found[1]
    assert len(set(found[1:])) == 3


def test_batches_are_spread_over_the_data_of_all_processes():
    class Samples:
        tokens = 600

        def __len__(self):
            return 6

    data = BlockData(Samples(), {})
    assert list(data.batches(1)) == [0]
    assert list(data.batches(300)) == [0, 2, 4]
    assert list(data.batches(301)) == list(data.batches(10**6)) == list(range(6))
    both = BlockData(Samples(), {}, Team(0, 2))
    assert list(both.batches(600)) == [0, 2, 4]


def test_m5_scales_down_to_the_largest_channel_that_is_none():
    peaks = torch.cat([torch.linspace(0.5, 1.5, 30), torch.tensor([8.0, 12.0])])
    scales = outlier_scales(peaks)
    assert torch.equal(scales[:30], torch.ones(30))
    torch.testing.assert_close(scales[30:], (peaks[30:] / 1.5) ** 0.7)
    # One of two that were detected is reserved if the wider gap lies above it.
    peaks[30] = 2.9
    scales = outlier_scales(peaks)
    assert torch.equal(scales[:31], torch.ones(31))
    torch.testing.assert_close(scales[31], (torch.tensor(12.0) / 2.9) ** 0.7)
    assert torch.equal(outlier_scales(torch.ones(8)), torch.ones(8))
    assert torch.equal(outlier_scales(torch.zeros(8)), torch.ones(8))


def test_m5_looks_at_both_signs():
    x = torch.rand(100, 20) - 0.5
    x[0, 4], x[1, 7] = -20.0, 30.0
    scales = CbqSmooth().scales(norm_link(20), statistics_of(x, 0), [])
    assert set(torch.nonzero(scales > 1).flatten().tolist()) == {4, 7}


def test_m6_uses_given_shares_and_searches_others():
    link, x, weight = random_case()
    stats, readers = statistics_of(x), [Reader(weight, W8A8)]
    given = FlexSmooth(0.75, 0.1).scales(link, stats, readers)
    expected = x.abs().amax(0) ** 0.75 / weight.abs().amax(0) ** 0.1
    torch.testing.assert_close(given, expected)
    error = LinkError(link, stats, readers)
    searched = FlexSmooth(0.3, None).scales(link, stats, readers)
    assert torch.equal(searched, FlexSmooth().scales(link, stats, readers))
    assert error(searched) <= min(error(given), error(torch.ones(32)))
    smooth = [SmoothQuant(step / 20).scales(link, stats, readers) for step in range(21)]
    assert error(searched) <= min(map(error, smooth))


def test_the_alpha_search_beats_every_tenth():
    link, x, weight = random_case(seed=3)
    stats, readers = statistics_of(x), [Reader(weight, W8A8)]
    error = LinkError(link, stats, readers)
    scales = AlphaSearch().scales(link, stats, readers)
    coarse = [SmoothQuant(n / 10).scales(link, stats, readers) for n in range(11)]
    assert error(scales) <= min(map(error, coarse))
    nothing = statistics_of(torch.ones(10, 4))
    eye = [Reader(torch.eye(4), W8A8)]
    assert torch.equal(AlphaSearch().scales(norm_link(4), nothing, eye), torch.ones(4))


def test_the_error_is_that_of_integers_with_the_range_of_all_tokens():
    link, x, weight = random_case()
    scales = torch.rand(32) + 0.5
    found = LinkError(link, statistics_of(x, 512), [Reader(weight, W8A8)])(scales)
    inputs, moved = x / scales, weight * scales
    low, high = inputs.min(), inputs.max()
    step = (high - low) / 255
    zero = (-low / step).round() - 128
    codes = (inputs / step + zero).round().clamp(-128, 127)
    row = moved.abs().amax(1, keepdim=True) / 127
    quantized = ((codes - zero) * step) @ ((moved / row).round() * row).T
    exact = x @ weight.T
    expected = (quantized - exact).square().sum() / exact.square().sum()
    assert found == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8s", "w8a16", "w4a16_g16"])
def test_the_error_of_other_schemes_is_relative_to_the_output(scheme):
    link, x, weight = random_case()
    readers = [Reader(weight, QuantScheme.parse(scheme))]
    assert 0 < LinkError(link, statistics_of(x), readers)(torch.ones(32)) < 0.1


def test_statistics_follow_a_shift():
    x = torch.randn(60, 5) + torch.arange(5.0)
    stats = statistics_of(x, 64)
    scale, shift = torch.rand(5) + 0.5, torch.randn(5)
    moved, expected = stats.moved(scale, shift), statistics_of((x - shift) / scale, 64)
    for name in ("low", "high", "tokens", "mean_magnitude", "midrange"):
        torch.testing.assert_close(getattr(moved, name), getattr(expected, name))


@pytest.mark.parametrize("name", list(SmoothMethod))
def test_recipes_name_every_method(name):
    smooth = Recipe.build(smooth=name.value).smooth
    method = scale_method(smooth)
    links = Recipe.build(smooth={"method": name.value, "links": ["v->o"]}).smooth
    assert scale_method(links).kinds == {LinkKind.V_O}
    assert method.kinds >= {LinkKind.NORM_LINEAR}

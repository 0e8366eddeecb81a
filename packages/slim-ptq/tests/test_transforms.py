"""Statistics, moving scales over links, and the choice of scales."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slim_core.errors import CalibrationError, InvalidValueError, NumericalError
from slim_core.scheme import FLOAT, QuantScheme
from slim_ptq.structure import (
    Link,
    LinkKind,
    NormForm,
    Target,
    find_blocks,
    find_linears,
    find_routers,
    trace_block,
    unfuse_experts,
)
from slim_ptq.transforms import (
    ChannelStats,
    LinkStatistics,
    Reader,
    SmoothQuant,
    ThresholdSmooth,
    scale_link,
    scaled,
    smooth_scales,
    smoothed_norms,
    suppress_block,
)
from slim_ptq.transforms.error import LinkError

W8A8 = QuantScheme.parse("w8a8")

# Norms of these compute in the type of the model; the others go through float32.
FULL_PRECISION = ["phi", "gpt2", "gpt_neox", "bloom", "falcon", "opt"]


def block_of(model, capture_block, ids):
    unfuse_experts(model)
    name = find_blocks(model)[0]
    args, kwargs = capture_block(model, name, ids)
    return model.get_submodule(name), args, kwargs


def schemes_of(block):
    return dict.fromkeys(find_linears(block), W8A8)


def output(block, args, kwargs):
    with torch.no_grad():
        out = block(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def random_scales(link, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.ones(link.width)
    channels = link.channels
    scales[channels] = torch.empty(len(channels)).uniform_(0.2, 5.0, generator=generator)
    return scales


def plain_link(width, readers=1, form=NormForm.PLAIN):
    index = torch.arange(width)
    targets = tuple(Target(f"reader{n}", "weight", 1, index) for n in range(readers))
    return Link(LinkKind.NORM_LINEAR, "norm", targets, width, form)


class NormAndReader(nn.Module):
    def __init__(self, width=8, out=5, dtype=torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.reader0 = nn.Linear(width, out)
        torch.nn.init.normal_(self.norm.weight, 1.0, 0.2)
        torch.nn.init.normal_(self.norm.bias)
        self.to(dtype)

    def forward(self, x):
        return self.reader0(self.norm(x))


@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    keep=st.integers(0, 6),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_statistics_do_not_depend_on_how_tokens_are_split(rows, keep, seed):
    x = torch.randn(sum(rows) + 1, 3, generator=torch.Generator().manual_seed(seed))
    whole, parts = ChannelStats(keep), ChannelStats(keep)
    whole.update(x[None])
    for part in x.split([*rows, 1]):
        parts.update(part)
    for stats in (whole, parts):
        assert stats.count == len(x)
        assert torch.equal(stats.low, x.amin(0))
        assert torch.equal(stats.high, x.amax(0))
        assert torch.equal(stats.absmax, x.abs().amax(0))
        assert len(stats.tokens) <= keep
    assert torch.equal(whole.tokens, parts.tokens)
    if keep:
        assert torch.equal(whole.tokens[0], x[0])


def test_statistics_of_two_places_can_be_merged():
    x = torch.randn(40, 4)
    one, two = ChannelStats(8), ChannelStats(8)
    one.update(x[:25])
    two.update(x[25:])
    one.merge(two)
    one.merge(ChannelStats())
    assert one.count == 40
    assert torch.equal(one.absmax, x.abs().amax(0))
    assert 1 <= len(one.tokens) <= 8


def test_statistics_without_data_are_an_error():
    with pytest.raises(CalibrationError, match="no calibration sample reached"):
        _ = ChannelStats().absmax


def test_smoothquant_scales_have_their_closed_form():
    absmax, columns = torch.tensor([4.0, 9.0, 0.0, 1.0]), torch.tensor([1.0, 0.25, 2.0, 0.0])
    expected = torch.tensor([2.0, 6.0, 1.0, 1 / math.sqrt(1e-5)])
    torch.testing.assert_close(smooth_scales(absmax, columns), expected)
    torch.testing.assert_close(smooth_scales(absmax, columns, 1.0)[:2], absmax[:2])
    with pytest.raises(InvalidValueError, match=r"alpha must be in \[0.0, 1.0\], not 1.5"):
        SmoothQuant(alpha=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_link_of_every_family_preserves_the_block(
    dtype, families, tiny_model, capture_block, tiny_ids
):
    for family in families:
        if family == "deepseek_v3" and dtype == torch.float64:
            continue  # transformers 4 routes in float32 and cannot add float64 to that
        model = tiny_model(family, dtype=dtype)
        if hasattr(model.config, "_experts_implementation"):
            model.config._experts_implementation = "eager"  # grouped kernels know no float64
        block, args, kwargs = block_of(model, capture_block, tiny_ids())
        expected = output(block, args, kwargs)
        before = {name: value.clone() for name, value in block.state_dict().items()}
        links = trace_block(block, args, kwargs).links
        assert {link.kind for link in links} >= {LinkKind.NORM_LINEAR, LinkKind.V_O}
        exact = dtype == torch.float64 and family in FULL_PRECISION
        tolerance = 1e-12 if exact else 1e-5 if dtype == torch.float32 else 1e-6
        for number, link in enumerate(links):
            with scaled(block, link, random_scales(link, number)):
                found = output(block, args, kwargs)
            error = float((found - expected).abs().max() / expected.abs().max())
            assert error < tolerance, (family, link.source)
            assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
        for number, link in enumerate(links):
            scale_link(block, link, random_scales(link, number))
        found = output(block, args, kwargs)
        assert float((found - expected).abs().max() / expected.abs().max()) < 4 * tolerance, family


@pytest.mark.parametrize("form", list(NormForm))
def test_readers_make_up_for_the_rounding_of_the_norm(form):
    block = NormAndReader(width=64, dtype=torch.bfloat16)
    if form is NormForm.ONE_PLUS:
        block.norm.weight.data -= 1
    shift = 1.0 if form is NormForm.ONE_PLUS else 0.0
    link = plain_link(64, form=form)
    old = block.norm.weight.detach().float() + shift
    effective = scale_link(block, link, random_scales(link))
    torch.testing.assert_close((block.norm.weight.detach().float() + shift) * effective, old)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.ones(7), r"must have shape \(8,\), not \(7,\)"),
        (torch.tensor([0.0] + [1.0] * 7), "must be positive and finite"),
        (torch.tensor([float("nan")] + [1.0] * 7), "must be positive and finite"),
    ],
)
def test_bad_scales_are_an_error(scales, message):
    with pytest.raises(InvalidValueError, match=message):
        scale_link(NormAndReader(), plain_link(8), scales)


def test_channels_that_are_not_linked_cannot_be_scaled():
    link = Link(
        LinkKind.UP_DOWN, "norm", (Target("reader0", "weight", 1, torch.arange(4)),), 8, None
    )
    with pytest.raises(InvalidValueError, match="norm touch channels that are not linked"):
        scale_link(NormAndReader(), link, torch.full((8,), 2.0))


def test_an_overflow_is_an_error_and_changes_nothing():
    block = NormAndReader(dtype=torch.float16)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(NumericalError, match=r"smoothing norm makes the weight of \w+ infinite"):
        scale_link(block, plain_link(8), torch.full((8,), 1e-6))
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def statistics_of(x, tokens=256):
    stats = ChannelStats(tokens)
    stats.update(x)
    return stats


def test_the_threshold_search_scales_outliers_and_not_the_rest():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator)
    weights = [torch.randn(24, 32, generator=generator) * 0.1]
    x[:, [3, 17]] *= 100.0
    weights[0][:, [3, 17]] /= 100.0
    readers = [Reader(weight, W8A8) for weight in weights]
    method, link = ThresholdSmooth(), plain_link(32)
    scales = method.scales(link, statistics_of(x), readers)
    assert torch.equal(scales, method.scales(link, statistics_of(x), readers))
    assert set(torch.nonzero(scales > 5).flatten().tolist()) == {3, 17}
    error = LinkError(link, statistics_of(x), readers)
    assert error(scales) < 0.05 * error(torch.ones(32))


def test_the_threshold_search_may_leave_everything_alone():
    x = torch.ones(10, 4)
    readers = [Reader(torch.eye(4), W8A8)]
    scales = ThresholdSmooth().scales(plain_link(4), statistics_of(x), readers)
    assert torch.equal(scales, torch.ones(4))


@pytest.mark.parametrize("method", [SmoothQuant(), ThresholdSmooth()])
def test_one_block_is_suppressed_with_its_own_statistics(
    method, tiny_model, capture_block, tiny_ids
):
    model = tiny_model("qwen3_moe")
    block, args, kwargs = block_of(model, capture_block, tiny_ids(40))
    links = [
        link
        for link in trace_block(block, args, kwargs).links
        if link.kind is LinkKind.NORM_LINEAR or "experts" not in link.source
    ]
    expected = output(block, args, kwargs)
    with LinkStatistics(block, links, tokens=method.tokens) as statistics:
        output(block, args, kwargs)
    done, skipped = suppress_block(block, links, statistics, method, schemes_of(block))
    assert skipped == ()
    assert [item.source for item in done] == [link.source for link in links]
    torch.testing.assert_close(output(block, args, kwargs), expected, rtol=1e-5, atol=1e-6)
    assert smoothed_norms(block) == {"input_layernorm", "post_attention_layernorm"}
    with LinkStatistics(block, links) as again:
        output(block, args, kwargs)
    for source, stats in again.of.items():
        torch.testing.assert_close(statistics.of[source].absmax, stats.absmax, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks for module in block.modules())


def test_layers_that_stay_float_have_no_say(tiny_model, capture_block, tiny_ids):
    model = tiny_model("llama")
    block, args, kwargs = block_of(model, capture_block, tiny_ids())
    links = trace_block(block, args, kwargs).links[:1]
    readers = links[0].target_names
    with LinkStatistics(block, links) as statistics:
        output(block, args, kwargs)
    absmax = statistics.of["input_layernorm"].absmax
    done, (skipped,) = suppress_block(block, links, statistics, SmoothQuant(), {})
    assert done == ()
    assert skipped.targets == readers
    assert skipped.reason == "all its readers stay in floating point"
    columns = block.self_attn.q_proj.weight.detach().abs().amax(0)
    schemes = {readers[0]: W8A8, readers[1]: FLOAT}
    done, _ = suppress_block(block, links, statistics, SmoothQuant(), schemes)
    torch.testing.assert_close(done[0].scales, (absmax / columns).sqrt())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_routers_choose_the_same_experts_in_half_precision(
    family, tiny_model, capture_block, tiny_ids
):
    model = tiny_model(family, dtype=torch.bfloat16)
    unfuse_experts(model)
    name = find_blocks(model)[-1]
    args, kwargs = capture_block(model, name, tiny_ids(60))
    block = model.get_submodule(name)
    links = [x for x in trace_block(block, args, kwargs).links if x.source.startswith("post")]
    router = block.get_submodule(next(iter(find_routers(block))))
    logits = []
    router.register_forward_hook(
        lambda module, inputs, out: logits.append(
            nn.functional.linear(inputs[0].float(), module.weight.float())
        )
    )
    with LinkStatistics(block, links) as statistics:
        output(block, args, kwargs)
    suppress_block(block, links, statistics, SmoothQuant(), schemes_of(block))
    output(block, args, kwargs)
    assert torch.equal(*logits)


def test_nan_in_a_weight_or_an_activation_names_the_layer(tiny_model, capture_block, tiny_ids):
    model = tiny_model("llama")
    block, args, kwargs = block_of(model, capture_block, tiny_ids())
    links = trace_block(block, args, kwargs).links
    with LinkStatistics(block, links, prefix="model.layers.0") as statistics:
        output(block, args, kwargs)
    with torch.no_grad():
        block.mlp.up_proj.weight[1, 1] = float("inf")
    with pytest.raises(NumericalError, match=r"weight of model\.layers\.0\.mlp\.up_proj has 1"):
        suppress_block(
            block, links, statistics, SmoothQuant(), schemes_of(block), prefix="model.layers.0"
        )
    with (
        LinkStatistics(block, links, prefix="model.layers.0"),
        pytest.raises(NumericalError, match=r"input of model\.layers\.0\.mlp\.down_proj has"),
    ):
        output(block, args, kwargs)

"""One layer against attention computed token by token from everything ever seen."""

from __future__ import annotations

import pytest
import torch

from slim_ra import AlibiWindows, RazorPolicy, RetrievalHeads
from slim_ra.geometry import HeadGeometry
from slim_ra.layer import RazorLayer
from slim_ra.store import HeadStore

SCALE = 0.35
D = 8


def policy(profile, heads=4, kv_heads=4, **options):
    geometry = HeadGeometry(1, heads, kv_heads, D, heads * D)
    return RazorPolicy(profile, geometry, **options)


def layer_for(policy, *, frozen=False, slopes=None):
    layer = RazorLayer(0, policy, frozen=frozen, check=lambda index: None)
    layer.alibi, layer.slopes = slopes is not None, slopes
    return layer


class Reference:
    """Keeps every token and works out for each query what it may see."""

    def __init__(self, policy, *, frozen=False, slopes=None):
        self.policy, self.frozen, self.slopes = policy, frozen, slopes
        self.cut = None

    def window(self, head, tokens):
        for group in self.policy.groups(0):
            if head in group.heads:
                if group.full:
                    return None
                return group.window or self.policy.window_for(tokens)
        raise AssertionError

    def output(self, query, keys, values, pads, seen, last, *, held=None):
        """Output of the query at column ``last``; ``held``: tokens seen when it was last cut."""
        batch, heads, _ = query.shape
        group = heads // keys.shape[1]
        out = torch.zeros(batch, heads, D, dtype=torch.float64)
        for row in range(batch):
            pad = int(pads[row])
            for head in range(heads):
                kv_head = head // group
                slope = 0.0 if self.slopes is None else float(self.slopes[head])
                out[row, head] = self.one(
                    query[row, head].double(),
                    keys[row, kv_head].double(),
                    values[row, kv_head].double(),
                    pad,
                    last,
                    held,
                    kv_head,
                    slope,
                )
        return out

    def one(self, query, keys, values, pad, last, held, kv_head, slope):
        bias = slope * torch.arange(len(keys), dtype=torch.float64)
        logits = keys @ query * SCALE + bias
        if held is None:
            start = pad
        else:
            anchor = self.cut if self.cut is not None else held
            if self.policy.grow:
                anchor = held
            window = self.window(kv_head, anchor - pad)
            end = self.cut if self.frozen else held
            start = pad if window is None else max(pad, end - window)
        sinks = min(self.policy.sink_size, start - pad)
        kept = [*range(pad, pad + sinks), *range(start, last + 1)]
        dropped = list(range(pad + sinks, start))
        use, value = logits[kept], values[kept]
        if dropped and self.policy.compensation == "mean":
            weight = bias[dropped].softmax(0)
            mean_key, mean_value = weight @ keys[dropped], weight @ values[dropped]
            extra = mean_key @ query * SCALE + bias[dropped].logsumexp(0)
            use, value = torch.cat([use, extra[None]]), torch.cat([value, mean_value[None]])
        return use.softmax(0) @ value


def run(
    policy, *, pads=(0, 0), heads=4, steps=40, first=30, chunk=0, frozen=False, slopes=None, seed=0
):
    """Feed ``first`` tokens, ``steps`` single ones, then a chunk; compare every output."""
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads = len(pads), policy.geometry.kv_heads
    total = first + steps + chunk
    keys, values = (torch.randn(batch, kv_heads, total, D, generator=generator) for _ in range(2))
    queries = torch.randn(batch, heads, total, D, generator=generator)
    layer = layer_for(policy, frozen=frozen, slopes=slopes)
    reference = Reference(policy, frozen=frozen, slopes=slopes)
    lengths = torch.tensor(pads)
    columns = None
    at = 0
    for count in [first] + [1] * steps + ([chunk] if chunk else []):
        new = slice(at, at + count)
        layer.update(keys[:, :, new].clone(), values[:, :, new].clone())
        if slopes is not None:
            columns = (slopes[:, None] * torch.arange(at + count)).float()[None] + 7.0
        got = layer.attend(
            queries[:, :, new], scale=SCALE, columns=columns, pads=lengths if any(pads) else None
        )
        if at == 0:
            held = None
        elif count == 1:
            held = at + 1
        else:
            held = at
        for offset in range(count):
            last = at + offset
            if last < int(lengths.max()):
                continue
            expected = reference.output(
                queries[:, :, last], keys, values, lengths, at, last, held=held
            )
            torch.testing.assert_close(got[:, :, offset].double(), expected, atol=1e-5, rtol=1e-4)
        at += count
        if reference.cut is None:
            reference.cut = at
    assert layer.get_seq_length() == total
    return layer


RETRIEVAL = RetrievalHeads({0: [1]})
CASES = {
    "plain": dict(window=10),
    "no sinks": dict(window=10, sink_size=0),
    "no compensation": dict(window=10, compensation="none"),
    "window of one": dict(window=1, sink_size=1),
    "filled while decoding": dict(window=33, sink_size=6),
    "never filled": dict(window=500),
    "rule": dict(buffer_min=4, buffer_ratio=3),
    "growing": dict(buffer_min=4, buffer_ratio=3, grow=True),
}


@pytest.mark.parametrize("pads", [(0, 0), (0, 7), (25, 3)], ids=str)
@pytest.mark.parametrize(
    ("case", "frozen"),
    [(case, False) for case in CASES] + [(case, True) for case in CASES if case != "growing"],
)
def test_layer_equals_reference(case, frozen, pads):
    run(policy(RETRIEVAL, **CASES[case]), pads=pads, frozen=frozen, chunk=9)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_queries(kv_heads):
    profile = RetrievalHeads({0: [kv_heads - 1]} if kv_heads > 1 else {})
    run(policy(profile, heads=8, kv_heads=kv_heads, window=6), heads=8, pads=(0, 4), steps=10)


@pytest.mark.parametrize("compensation", ["mean", "none"])
@pytest.mark.parametrize("pads", [(0, 0), (0, 7)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_alibi_layer_equals_reference(compensation, pads, frozen):
    slopes = torch.tensor([0.5, 0.1, 0.01, 1 / 256], dtype=torch.float64)
    profile = AlibiWindows(torch.tensor([3, 10, 10, 45]))
    run(
        policy(profile, compensation=compensation, sink_size=2),
        pads=pads,
        frozen=frozen,
        slopes=slopes,
        chunk=9,
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_alibi_compensation_of_query_heads_that_share_a_kv_head(kv_heads, frozen):
    """Each query head weighs what was dropped by its own slope."""
    slopes = torch.tensor([0.5, 0.1, 0.01, 1 / 256], dtype=torch.float64)
    profile = AlibiWindows(torch.tensor([3, 10, 10, 45]))
    rules = policy(profile, kv_heads=kv_heads, compensation="mean", sink_size=2)
    layer = run(rules, pads=(0, 7), frozen=frozen, slopes=slopes, chunk=9)
    group = 4 // kv_heads
    means = [store.mean_key.shape for store in layer.stores]
    assert means == [(2, len(store.heads), group, D) for store in layer.stores]


@pytest.mark.parametrize("slope", [0.0, 0.5, 0.01, 1 / 256])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_identical_dropped_tokens_are_compensated_exactly(slope, kv_heads, monkeypatch):
    """With the weight of the dropped tokens the result is exact; without it, far off."""
    slopes = torch.full((4,), slope, dtype=torch.float64) if slope else None
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, kv_heads, 1, D, generator=generator).expand(-1, -1, -1, 200, -1)
    key, value = key.clone(), value.clone()
    key[:, :, -1:], value[:, :, -1:] = torch.randn(2, 1, kv_heads, 1, D, generator=generator)
    query = torch.randn(1, 4, 1, D, generator=generator)
    profile = RetrievalHeads({}) if slopes is None else AlibiWindows(torch.ones(4).long())
    rules = policy(profile, kv_heads=kv_heads, sink_size=0, window=1, compensation="mean")

    def decoded():
        layer = layer_for(rules, slopes=slopes)
        for new in (slice(0, 199), slice(199, 200)):
            layer.update(key[:, :, new].clone(), value[:, :, new].clone())
            columns = None if slopes is None else slope * torch.arange(new.stop).expand(1, 4, -1)
            rows = query.expand(-1, -1, new.stop - new.start, -1)
            got = layer.attend(rows, scale=SCALE, columns=columns)
        return got[:, :, 0]

    share = 4 // kv_heads
    logits = (query @ key.repeat_interleave(share, 1).mT)[:, :, 0] * SCALE
    weights = (logits + slope * torch.arange(200.0)).softmax(-1)
    full = (weights[:, :, None] @ value.repeat_interleave(share, 1))[:, :, 0]
    torch.testing.assert_close(decoded(), full, atol=1e-5, rtol=0)

    weighted = HeadStore.compensation

    def unweighted(store, reference):
        extra = weighted(store, reference)
        if extra is not None:
            extra.log_weight = extra.log_weight - store._mass(store.dropped).log()
        return extra

    monkeypatch.setattr(HeadStore, "compensation", unweighted)
    assert float((decoded() - full).abs().max()) > 0.1


def test_streaming_mean_equals_direct_mean():
    rules = policy(RetrievalHeads({0: [0]}), window=16, sink_size=4)
    layer = run(rules, pads=(0, 0), first=100, steps=0)
    generator = torch.Generator().manual_seed(5)
    keys = [layer.stores[1].mean_key.clone()]
    assert keys[0].shape == (2, 3, 1, D)
    before = layer.stores[1].nbytes()
    full_before = layer.stores[0].nbytes()
    seen = []
    for _ in range(1000):
        key, value = torch.randn(2, 2, 4, 1, D, generator=generator)
        seen.append(key)
        layer.update(key.clone(), value)
        layer.attend(torch.randn(2, 4, 1, D, generator=generator), scale=SCALE)
    store = layer.stores[1]
    assert int(store.dropped[0]) == 100 + 1000 - 16 - 4
    assert store.nbytes() == before  # constant
    assert layer.stores[0].nbytes() - full_before == 1000 * 2 * 2 * D * 4
    fed = torch.cat(seen, 2)[:, 1:, : 1000 - 16]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, 100, D, generator=generator)[:, 1:, 4:]
    direct = torch.cat([first, fed], 2).double().mean(2, keepdim=True)
    torch.testing.assert_close(store.mean_key.double(), direct, atol=1e-5, rtol=0)


def test_prefill_mode_keeps_what_comes():
    rules = policy(RetrievalHeads({0: [0]}), window=16)
    layer = layer_for(rules, frozen=True)
    generator = torch.Generator().manual_seed(5)

    def feed(count):
        key, value = torch.randn(2, 1, 4, count, D, generator=generator)
        layer.update(key, value)
        layer.attend(torch.randn(1, 4, count, D, generator=generator), scale=SCALE)

    feed(100)
    before = sum(store.nbytes() for store in layer.stores)
    for _ in range(30):
        feed(1)
    assert sum(store.nbytes() for store in layer.stores) - before == 30 * 2 * D * 4 * 4


def test_batch_operations_move_everything():
    rules = policy(RETRIEVAL, window=6)
    layer = run(rules, pads=(0, 5), steps=20)
    before = [
        {
            name: getattr(store, name).clone()
            for name in ("keys", "values", "mean_key", "mean_value", "dropped", "pads")
        }
        for store in layer.stores
    ]
    layer.reorder_cache(torch.tensor([1, 1]))
    for store, old in zip(layer.stores, before, strict=True):
        for name, tensor in old.items():
            if tensor.numel():
                assert torch.equal(getattr(store, name), tensor[[1, 1]]), name
    layer.batch_repeat_interleave(3)
    assert layer.stores[0].keys.shape[0] == 6
    layer.batch_select_indices(torch.tensor([5]))
    assert layer.stores[1].mean_key.shape[0] == 1
    layer.reset()
    assert layer.get_seq_length() == 0


def test_growth_keeps_slack_small():
    store = HeadStore(torch.tensor([0]), None, sink_size=0, compensate=False)
    store.start(torch.zeros(1, 1, 1000, D), torch.zeros(1, 1, 1000, D), None)
    assert store.allocated() == store.nbytes() == 1000 * 2 * D * 4
    for _ in range(50):
        store.push(torch.zeros(1, 1, 1, D), torch.zeros(1, 1, 1, D))
    assert store.nbytes() == 1050 * 2 * D * 4
    assert store.allocated() <= 1.13 * 1001 * 2 * D * 4


def test_many_windows_are_rounded_up_to_buckets():
    geometry = HeadGeometry(1, 40, 40, D, 40 * D)
    windows = torch.arange(40) * 37 + 5
    groups = RazorPolicy(AlibiWindows(windows), geometry).groups(0)
    assert len(groups) < 16
    for group in groups:
        for head in group.heads:
            assert windows[head] <= group.window <= windows[head] * 2**0.5 + 1
    assert sorted(head for group in groups for head in group.heads) == list(range(40))


@pytest.mark.parametrize(
    "options",
    [
        {"sink_size": -1},
        {"buffer_min": 0},
        {"buffer_ratio": 0},
        {"window": 0},
        {"protect_first_layers": 2},
        {"compensation": "median"},
    ],
)
def test_policy_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        policy(RETRIEVAL, **options)


def test_policy_must_fit_the_model():
    with pytest.raises(ValueError, match="KV head 4 of layer 0"):
        policy(RetrievalHeads({0: [4]}))
    with pytest.raises(ValueError, match="shape"):
        policy(AlibiWindows(torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="at least 1"):
        policy(AlibiWindows(torch.tensor([1, 2, 3, -46])))
    assert policy(RETRIEVAL, protect_first_layers=1).groups(0)[0].full

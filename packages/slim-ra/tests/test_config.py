from __future__ import annotations

import math

import pytest

from slim_ra import RACompressConfig, RARopeCompressConfig


def test_defaults():
    alibi, rope = RACompressConfig(), RARopeCompressConfig()
    assert (alibi.theta, alibi.alpha) == (1e-5, 100)
    assert (rope.induction_head_ratio, rope.echo_head_ratio) == (0.14, 0.01)


@pytest.mark.parametrize(("theta", "alpha"), [(1e-5, 0), (1e-3, 10000)])
def test_alibi_bounds_are_inclusive(theta, alpha):
    assert RACompressConfig(theta=theta, alpha=alpha).alpha == alpha


@pytest.mark.parametrize(
    "kwargs",
    [{"theta": 1e-6}, {"theta": 2e-3}, {"alpha": -1}, {"alpha": 10001}, {"theta": math.nan}],
)
def test_alibi_range(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        RACompressConfig(**kwargs)


@pytest.mark.parametrize("kwargs", [{"alpha": True}, {"alpha": 1.0}, {"theta": 1}, {"theta": "x"}])
def test_alibi_types(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        RACompressConfig(**kwargs)


@pytest.mark.parametrize("name", ["induction_head_ratio", "echo_head_ratio"])
def test_rope_ratios(name):
    for good in (0.0, 1.0):
        assert getattr(RARopeCompressConfig(**{name: good}), name) == good
    for bad in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=name):
            RARopeCompressConfig(**{name: bad})
    for wrong in (1, 0, True, "0.1", None):
        with pytest.raises(TypeError, match=name):
            RARopeCompressConfig(**{name: wrong})

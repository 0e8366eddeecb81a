"""Every public name of the package can be imported, and its home says the same."""

from __future__ import annotations

import pytest

import slim_ptq


@pytest.mark.parametrize("name", slim_ptq.__all__)
def test_names(name: str) -> None:
    found = getattr(slim_ptq, name)
    assert name == "__version__" or found.__doc__
    assert name in dir(slim_ptq)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Calibrater'"):
        _ = slim_ptq.Calibrater

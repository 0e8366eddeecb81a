import pytest

from slim_core.errors import InvalidValueError
from slim_core.registry import Registry


@pytest.fixture
def registry():
    registry = Registry("method")

    @registry.register("minmax")
    def minmax():
        return 1

    registry.register("gptq")(lambda: 2)
    return registry


def test_entries_by_name(registry):
    assert registry["minmax"]() == 1
    assert registry["minmax"].__name__ == "minmax"
    assert list(registry) == ["minmax", "gptq"]
    assert len(registry) == 2


def test_unknown_name_is_an_error_with_neighbours(registry):
    with pytest.raises(InvalidValueError, match="method must be one of 'minmax', 'gptq'") as caught:
        registry["minimax"]
    assert caught.value.hint == "did you mean 'minmax'?"
    with pytest.raises(InvalidValueError, match="not 3"):
        registry[3]


def test_a_name_is_taken_once(registry):
    with pytest.raises(KeyError, match="method 'gptq' is registered twice"):
        registry.register("gptq")(print)

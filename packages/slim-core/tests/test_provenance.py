import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import pytest

from slim_core import __version__
from slim_core.errors import InvalidTypeError
from slim_core.provenance import fingerprint, provenance


def test_content():
    result = provenance(["safetensors", "no-such-distribution"], recipe={"a": 1}, seed=7)
    assert result["packages"]["slim-core"] == __version__
    assert result["packages"]["numpy"] == np.__version__
    assert list(result["packages"]) == ["slim-core", "numpy", "safetensors"]
    assert result["python"] == platform.python_version()
    assert result["recipe_sha256"] == hashlib.sha256(b'{"a":1}').hexdigest()
    assert result["seed"] == 7
    assert "config_sha256" not in result
    json.dumps(result)


def test_nothing_about_the_user():
    result = provenance(config={"_name_or_path": str(Path.home() / "secret-model")})
    assert set(result) == {"packages", "python", "platform", "config_sha256"}
    text = json.dumps(result)
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), "secret-model"):
        assert private not in text


def test_fingerprints_do_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint(b"abc") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_only_json_has_a_fingerprint(value):
    with pytest.raises(InvalidTypeError, match="JSON"):
        fingerprint({"a": value})

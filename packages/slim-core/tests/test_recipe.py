"""Tests of recipes: reading, refusing, and writing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slim_core.errors import FileSecurityError, RecipeError
from slim_core.recipe import ObserverKind, Recipe, SmoothMethod
from slim_core.scheme import QuantScheme

FULL = """
scheme: w8a8
exclude: ["*.layers.0.mlp.down_proj"]
rules:
  - {match: "*down_proj", scheme: w8a8_dynamic}
  - {match: "*.1.*", scheme: float}
smooth: {method: threshold, alpha: 0.7}
observer: histogram
fallback: 2
format: safe_tensor
"""


def test_a_recipe_of_everything(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(FULL)
    recipe = Recipe.load(file)
    assert recipe.scheme == QuantScheme.parse("w8a8")
    assert recipe.exclude == ("*.layers.0.mlp.down_proj",)
    assert [(rule.match, str(rule.scheme)) for rule in recipe.rules] == [
        ("*down_proj", "w8a8_dynamic"),
        ("*.1.*", "float"),
    ]
    assert recipe.smooth is not None
    assert (recipe.smooth.method, recipe.smooth.alpha) == (SmoothMethod.THRESHOLD, 0.7)
    assert recipe.observer is ObserverKind.HISTOGRAM
    assert (recipe.fallback, recipe.format) == (2, "safe_tensor")
    assert {str(scheme) for scheme in recipe.schemes()} == {"w8a8", "w8a8_dynamic", "float"}


def test_defaults() -> None:
    recipe = Recipe.build()
    assert str(recipe.scheme) == "w8a8"
    assert recipe.format == "ascend_v1"
    assert recipe.observer is ObserverKind.MEAN_MINMAX
    assert (recipe.rules, recipe.exclude, recipe.fallback, recipe.smooth) == ((), (), 0, None)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_written_reads_the_same(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "first.yaml").write_text(FULL)
    recipe = Recipe.load(tmp_path / "first.yaml")
    text = recipe.to_yaml() if suffix == "yaml" else json.dumps(recipe.to_dict())
    file = tmp_path / f"second.{suffix}"
    file.write_text(text)
    assert Recipe.load(file) == recipe
    assert Recipe.build(**recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sceme": "w8a8"}, "sceme: unknown key; known are scheme, method, rules"),
        ({"scheme": "w9a8"}, "scheme: scheme 'w9a8' is unknown"),
        ({"scheme": 8}, "scheme: scheme must be str"),
        ({"format": "gguf"}, "format: format must be one of"),
        ({"fallback": -1}, "fallback"),
        ({"fallback": "two"}, "fallback"),
        ({"smooth": {"alpha": 1.5}}, "smooth.alpha"),
        ({"smooth": {"method": "magic"}}, "smooth.method"),
        ({"smooth": {"strength": 1}}, "smooth.strength: unknown key"),
        ({"rules": [{"match": "", "scheme": "w8a8"}]}, "rules.0.match"),
        ({"rules": [{"scheme": "w8a8"}]}, "rules.0.match"),
        ({"observer": "median"}, "observer"),
        ({"exclude": "*.down_proj"}, "exclude"),
    ],
)
def test_wrong_keys_and_values_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.build(**values)
    assert says in str(caught.value)


def test_all_mistakes_are_listed() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.build(fallback=-1, format="x", observer="y")
    assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "must hold a mapping of keys, not list"),
        (b"", "must hold a mapping of keys, not NoneType"),
        (b"{", "is not YAML or JSON"),
        (b"\xff\xfe\x00", "is not YAML or JSON"),
        (b"scheme: !!python/object/apply:os.system ['true']\n", "is not YAML or JSON"),
        (b"fallback: -1\n", "fallback"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.load(file)
    assert "recipe.yaml" in str(caught.value)


def test_files_that_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "none.yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: w8a8")
    file.chmod(0o666)
    with pytest.raises(FileSecurityError):
        Recipe.load(file)
    file.chmod(0o600)
    file.write_text("#" * ((1 << 20) + 1))
    with pytest.raises(FileSecurityError, match="more than"):
        Recipe.load(file)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.build()
    with pytest.raises(ValueError, match="frozen"):
        recipe.fallback = 3  # type: ignore[misc]

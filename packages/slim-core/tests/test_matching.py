import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import PatternError
from slim_core.matching import match, match_all

NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
] + ["lm_head"]


def test_globs():
    assert match("lm_head", NAMES) == ["lm_head"]
    assert match("*.down_proj", NAMES) == [f"model.layers.{i}.mlp.down_proj" for i in range(12)]
    assert match("model.layers.1.*", NAMES) == [n for n in NAMES if n.startswith("model.layers.1.")]
    assert match("*.[01].self_attn.?_proj", NAMES) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
    ]


def test_globs_are_case_sensitive_and_match_whole_names():
    assert match("LM_HEAD", NAMES) == []
    assert match("down_proj", NAMES) == []
    assert match("lm_hea", NAMES) == []
    assert match("a\nb", ["a\nb"]) == ["a\nb"]


@given(st.lists(st.text("ab._0", min_size=1), unique=True))
def test_plain_names_match_themselves(names):
    for name in names:
        assert match(name, names) == [name]
    assert match("*", names) == names


def test_match_all_keeps_patterns_apart():
    assert match_all("exclude", ["lm_*", "*.11.mlp.*"], NAMES) == {
        "lm_*": ["lm_head"],
        "*.11.mlp.*": ["model.layers.11.mlp.down_proj"],
    }
    assert match_all("exclude", [], NAMES) == {}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("model.layers.3.mlp.downproj", "did you mean 'model.layers.3.mlp.down_proj'"),
        ("lm_heads", "did you mean 'lm_head'?"),
        ("*down_projj", "layer names look like model.layers.0.self_attn.q_proj, "),
        ("blocks.*.o_proj", "names that contain 'o_proj': model.layers.0.self_attn.o_proj, "),
        ("*", None),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern, hint):
    if hint is None:
        with pytest.raises(PatternError, match="no layer is called") as caught:
            match_all("exclude", [pattern], [])
        assert caught.value.hint == "there are no layers"
        return
    with pytest.raises(PatternError, match="exclude: no layer is called") as caught:
        match_all("exclude", ["lm_head", pattern], NAMES)
    assert repr(pattern) in caught.value.message
    assert "'lm_head'" not in caught.value.message
    assert caught.value.hint.startswith(hint)


def test_all_lost_patterns_are_named():
    with pytest.raises(PatternError, match="no layer is called 'x' or 'y'"):
        match_all("rules", ["x", "lm_head", "y"], NAMES)

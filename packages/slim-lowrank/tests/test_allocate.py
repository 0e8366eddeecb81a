import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.errors import InvalidTypeError, InvalidValueError, PlanError
from slim_lowrank.allocate import Option, allocate
from slim_lowrank.table import LayerRanks, from_json, load_table, save_table, to_json


def options_of(pairs):
    return [Option(float(cost), float(loss), None) for cost, loss in pairs]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 50)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 120),
)
def test_never_over_budget_and_near_the_best(layers, budget):
    options = {str(index): options_of(pairs) for index, pairs in enumerate(layers)}
    totals = [
        (sum(option.cost for option in picks), sum(option.loss for option in picks))
        for picks in itertools.product(*options.values())
    ]
    feasible = [loss for cost, loss in totals if cost <= budget]
    if not feasible:
        with pytest.raises(PlanError):
            allocate(options, budget)
        return
    chosen = allocate(options, budget)
    assert sum(option.cost for option in chosen.values()) <= budget
    # The gap of a Lagrangian choice is at most one layer's largest step.
    step = max(max(o.loss for o in each) - min(o.loss for o in each) for each in options.values())
    assert sum(option.loss for option in chosen.values()) <= min(feasible) + step


def test_exact_on_convex_curves():
    rng = np.random.default_rng(0)
    energies = [np.sort(rng.exponential(scale, 40))[::-1] for scale in (1.0, 5.0, 0.2)]
    options = {
        str(index): options_of((rank, values[rank:].sum()) for rank in range(41))
        for index, values in enumerate(energies)
    }
    chosen = allocate(options, 50)
    best = np.sort(np.concatenate(energies))[::-1][50:].sum()
    assert sum(option.cost for option in chosen.values()) == 50
    assert sum(option.loss for option in chosen.values()) == pytest.approx(best)


def test_dense_is_taken_where_it_is_cheaper():
    options = {
        "a": [Option(100, 0, None), Option(99, 50, None)],
        "b": options_of([(100, 0), (10, 1)]),
    }
    chosen = allocate(options, 110)
    assert (chosen["a"].cost, chosen["b"].cost) == (100, 10)


def test_impossible_budget_says_what_would_do():
    with pytest.raises(PlanError, match="least possible cost, 10"):
        allocate({"a": options_of([(10, 1), (100, 0)])}, 9)


def entry(**changes):
    values = {
        "name": "fc",
        "kind": "linear",
        "shape": (64, 32),
        "form": "factors",
        "ranks": (8,),
        "bias": True,
    }
    return LayerRanks(**(values | changes))


def test_table_round_trip(tmp_path):
    table = {
        "fc": entry(),
        "conv": entry(name="conv", kind="conv2d", shape=(8, 4, 3, 3), form="tucker2", ranks=(4, 2)),
    }
    save_table(tmp_path / "ranks.json", table)
    assert (tmp_path / "ranks.json").stat().st_mode & 0o777 == 0o640
    assert load_table(tmp_path / "ranks.json") == table


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": (33,)},
        {"ranks": (0,)},
        {"ranks": (4, 4)},
        {"form": "tucker2", "ranks": (4, 4)},
        {"form": "svd"},
        {"shape": (8, 4, 3), "form": "spatial"},
        {"shape": (8, 8), "form": "pivot", "ranks": (8,)},
    ],
)
def test_entries_that_cannot_be(changes):
    with pytest.raises(InvalidValueError, match="fc"):
        entry(**changes)


@pytest.mark.parametrize("break_it", ["version", "key", "shape", "bias", "top"])
def test_bad_tables(break_it):
    value = to_json([entry()])
    layer = value["layers"]["fc"]
    if break_it == "version":
        value["version"] = 2
    elif break_it == "key":
        layer["extra"] = 1
    elif break_it == "shape":
        layer["shape"] = "64x32"
    elif break_it == "bias":
        layer["bias"] = "yes"
    else:
        value = []
    with pytest.raises((InvalidTypeError, InvalidValueError)):
        from_json(value)


def test_file_that_is_not_json(tmp_path):
    (tmp_path / "ranks.json").write_text("{")
    with pytest.raises(InvalidValueError, match="not JSON"):
        load_table(tmp_path / "ranks.json")

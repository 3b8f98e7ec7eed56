"""Recipes, measurements, metrics, tables of names and errors."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trilemma.core import errors
from trilemma.core.environment import read_environment
from trilemma.core.errors import InputError, MissingExtraError, RecipeError, TrilemmaError, UnknownNameError
from trilemma.core.measurement import Measurement
from trilemma.core.metric import METRICS, resolve_metric
from trilemma.core.quantity import format_duration, format_percent, format_quantity
from trilemma.core.recipe import Recipe, Step
from trilemma.core.registry import Registry
from trilemma.core.results import read_report

settings = st.dictionaries(
    st.text("abcdefg_", min_size=1, max_size=8),
    st.one_of(st.integers(-1000, 1000), st.booleans(), st.floats(-10, 10), st.text("abc-: {}#'\"", max_size=9)),
    max_size=4,
)


@given(st.lists(st.tuples(st.sampled_from(["rtn", "gptq", "kv_cache"]), settings), max_size=4), st.integers(0, 99))
def test_a_recipe_survives_yaml_with_its_hash(steps, seed):
    recipe = Recipe(name="x", seed=seed, steps=tuple(Step(technique=name, settings=each) for name, each in steps))
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash


def test_the_hash_follows_what_decides_the_bytes_and_not_the_name():
    step = Step(technique="rtn", settings={"format": "int4-g32"})
    recipe = Recipe(name="one", steps=(step,))
    assert Recipe(name="two", steps=(step,)).hash == recipe.hash
    assert Recipe(name="one", seed=1, steps=(step,)).hash != recipe.hash
    assert Recipe(name="one", steps=(step, step)).hash != recipe.hash


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "mapping"),
        ("version: 7", "version 7"),
        ("version: 1\nstepps: []", "stepps"),
        ("version: 1\nsteps: [{technique: rtn, setings: {}}]", "setings"),
        ("a: [", "YAML"),
    ],
)
def test_a_wrong_recipe_is_refused(text, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.from_yaml(text)


def test_an_unavailable_measurement_has_a_reason_and_no_value():
    missing = Measurement.unavailable("energy", "no counter")
    assert missing.value is None
    assert missing.interval is None
    with pytest.raises(ValidationError, match="reason"):
        Measurement(metric="power_w", value=None, unit="W", direction="lower", source="unavailable")
    with pytest.raises(ValidationError, match="no value exactly"):
        Measurement(metric="power_w", value=0.0, unit="W", direction="lower", source="unavailable", reason="x")


def test_a_count_is_its_own_interval_and_an_unknown_one_is_none():
    assert Measurement.of("weights", 10).interval == (10, 10)
    assert Measurement.of("tpot", 0.1).interval is None
    assert Measurement.of("tpot", 0.1, ci95=(0.05, 0.2)).interval == (0.05, 0.2)
    assert Measurement.of("weights", 10, source="estimated").interval is None


def test_records_refuse_unknown_keys_and_do_not_change():
    with pytest.raises(ValidationError, match="unknwon"):
        Step(technique="rtn", unknwon=1)
    with pytest.raises(ValidationError, match="frozen"):
        Step(technique="rtn").technique = "gptq"


def test_metric_aliases_are_unique_and_resolve():
    aliases = [metric.alias for metric in METRICS.values() if metric.alias]
    assert len(set(aliases)) == len(aliases)
    for name, metric in METRICS.items():
        assert resolve_metric(name) is metric
        assert metric.alias is None or resolve_metric(metric.alias) is metric
    with pytest.raises(UnknownNameError, match="Did you mean 'tpot'"):
        resolve_metric("tpott")


def test_a_table_loads_on_first_use_and_refuses_a_second_meaning():
    table: Registry[object] = Registry("thing", {"pi": "math:pi"})
    assert table.get("pi") == pytest.approx(3.14159, abs=1e-4)
    assert "pi" in table
    assert "tau" not in table
    table.register("pi", "math:pi")
    table.register("tau", "math:tau")
    assert table.names() == ["pi", "tau"]
    with pytest.raises(ValueError, match="already registered"):
        table.register("pi", "math:e")
    with pytest.raises(UnknownNameError, match="Valid: pi, tau"):
        table.get("phi")


def test_an_entry_whose_package_is_missing_names_the_extra(monkeypatch, tmp_path):
    (tmp_path / "needs_torch_here.py").write_text("import torch\n")
    (tmp_path / "needs_nothing_known.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    table: Registry[object] = Registry("thing", {"a": "needs_torch_here:x", "b": "needs_nothing_known:x"})
    with pytest.raises(MissingExtraError, match=r"The thing 'a' needs .*trilemma\[compress\]"):
        table.get("a")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        table.get("b")


def test_every_error_is_one_of_ours_and_stands_in_the_tree():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, TrilemmaError) for kind in kinds)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)


def test_a_report_of_another_schema_is_refused():
    with pytest.raises(InputError, match="schema version"):
        read_report('{"schema_version": 1, "surprise": 2}')


def test_the_environment_names_this_machine():
    environment = read_environment(isa="avx2", threads=2, seed=5)
    assert environment.cores >= 1
    assert environment.cpu
    assert environment.packages["numpy"]
    assert environment.memory_bytes > 2**20


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (13_644_224, "bytes", "13.6 MB"),
        (0.0213, "s", "21.3 ms"),
        (0.02, "ratio", "2.0%"),
        (None, "s", "—"),
        (float("nan"), "s", "—"),
        (95, "s", "1.58 min"),
        (0.00123, "nats", "0.00123 nats"),
    ],
)
def test_quantities_read_as_people_write_them(value, unit, shown):
    assert format_quantity(value, unit) == shown


def test_durations_and_per_cents():
    assert format_duration(200) == "3 min 20 s"
    assert format_duration(3900) == "1 h 5 min"
    assert format_percent(-0.00001, signed=True) == "-0.0010%"

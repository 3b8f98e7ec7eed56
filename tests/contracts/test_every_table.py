"""Every table of names: each entry loads and is listed; an unknown name is answered with the valid ones."""

from __future__ import annotations

import pytest

from trilemma.cli.list_names import _names
from trilemma.core.errors import UnknownNameError
from trilemma.core.metric import resolve_metric
from trilemma.export import EXPORTERS
from trilemma.formats import FORMATS
from trilemma.measure import METERS
from trilemma.model.families import FAMILIES
from trilemma.runtime import ENGINES
from trilemma.techniques import TECHNIQUES
from trilemma.techniques.schemes import list_schemes, scheme_to_recipe

TABLES = {
    "techniques": TECHNIQUES, "formats": FORMATS, "families": FAMILIES, "engines": ENGINES, "exporters": EXPORTERS,
    "meters": METERS,
}  # fmt: skip
ENTRIES = [(kind, name) for kind, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_entry_loads_and_is_listed(kind, name):
    assert TABLES[kind].get(name) is TABLES[kind].get(name)
    if kind != "meters":
        assert name in _names(kind)


@pytest.mark.parametrize("kind", TABLES)
def test_an_unknown_name_is_answered(kind):
    known = TABLES[kind].names()[0]
    with pytest.raises(UnknownNameError, match=known) as caught:
        TABLES[kind].get(known[:-1] + "~")
    assert "Did you mean" in str(caught.value) or len(known) < 3


def test_every_meter_measures_a_metric_of_the_vocabulary():
    assert [resolve_metric(name).name for name in METERS.names()] == METERS.names()


@pytest.mark.parametrize("name", list_schemes())
def test_every_recommended_scheme_is_a_recipe(name):
    recipe = scheme_to_recipe(name)
    assert recipe.name == name
    assert recipe.steps
    assert all(step.technique in TECHNIQUES for step in recipe.steps)

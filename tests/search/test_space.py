"""Every recipe that a search may try can be applied, and names tell them apart."""

import pytest

from trilemma.core.recipe import Recipe
from trilemma.search.space import candidates
from trilemma.techniques.apply import check_recipe, needs_calibration


@pytest.mark.parametrize("sizes", [{}, {"tied": False}, {"layers": 1}, {"layers": 5}, {"qkv_bias": True}])
def test_every_recipe_is_valid_and_named_once(tiny_model, sizes):
    config = tiny_model(**sizes).config
    found = candidates(config, seed=7)
    for recipe in found:
        check_recipe(recipe, config)
        assert recipe.seed == 7
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert len({recipe.name for recipe in found}) == len({recipe.hash for recipe in found}) == len(found) > 10


def test_a_short_search_starts_with_what_needs_no_calibration(tiny_model):
    config = tiny_model().config
    assert not any(needs_calibration(recipe, config) for recipe in candidates(config)[:2])


def test_ends_are_kept_in_eight_bits_only_where_there_is_a_middle(tiny_model):
    def names(layers):
        return {recipe.name for recipe in candidates(tiny_model(layers=layers).config)}

    assert names(4) - names(3) == {"W4A8-g32-gptq+ends8"}
    overrides = next(
        recipe.steps[0].settings["overrides"]
        for recipe in candidates(tiny_model(layers=5).config)
        if recipe.name.endswith("ends8")
    )
    assert set(overrides) == {"layers.0.*.weight", "layers.4.*.weight"}

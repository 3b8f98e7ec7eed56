"""Bits by part against brute force over all assignments, on made-up sensitivities."""

import itertools

import numpy as np
import pytest

from trilemma.core.recipe import Recipe
from trilemma.formats.pack import PackedMatrix, format_bytes
from trilemma.search.allocate import HIGH, LOW, allocation, parts_of, sensitivities
from trilemma.search.predict import predict_bytes
from trilemma.techniques.apply import check_recipe


def sizes_of(config, parts):
    shapes = config.tensor_shapes()
    return [
        {form: sum(format_bytes(form, shapes[name]) for name in part.names) for form in (LOW, HIGH)} for part in parts
    ]


def brute_force(sizes, kl, most):
    """The least sum of KL over all ways to give each part 4 or 8 bits within the bytes."""
    best = None
    for high in itertools.product((False, True), repeat=len(sizes)):
        size = sum(item[HIGH if up else LOW] for item, up in zip(sizes, high, strict=True))
        cost = sum(0.0 if up else loss for loss, up in zip(kl, high, strict=True))
        if size <= most and (best is None or cost < best):
            best = cost
    return best


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force(tiny_model, seed, tied):
    model = tiny_model(layers=3, tied=tied, vocab=61)
    config, rng = model.config, np.random.default_rng(seed)
    parts = parts_of(config)
    sizes = sizes_of(config, parts)
    kl = {part.pattern: float(10 ** rng.uniform(-5, 0)) for part in parts}
    low, high = (sum(item[form] for item in sizes) for form in (LOW, HIGH))
    most = low + rng.uniform(0, 1) * (high - low)
    recipe = allocation(config, parts, kl, most, seed=3)
    check_recipe(recipe, config)
    rest = predict_bytes(model, Recipe(), 8).weights_bytes - sum(
        4 * rows * columns for rows, columns in (config.tensor_shapes()[name] for part in parts for name in part.names)
    )
    assert predict_bytes(model, recipe, 8).weights_bytes - rest <= most
    settings = recipe.steps[0].settings
    in_eight = set(settings["overrides"]) | {
        name for name, key in (("embedding.weight", "embedding"), ("head.weight", "head")) if settings.get(key) == HIGH
    }
    cost = sum(loss for pattern, loss in kl.items() if pattern not in in_eight)
    assert cost == pytest.approx(brute_force(sizes, list(kl.values()), most), rel=1e-9)


def test_the_ends_and_what_does_not_fit(tiny_model):
    config = tiny_model().config
    parts = parts_of(config)
    kl = dict.fromkeys((part.pattern for part in parts), 0.1)
    sizes = sizes_of(config, parts)
    everything = allocation(config, parts, kl, sum(item[HIGH] for item in sizes), seed=0)
    nothing = allocation(config, parts, kl, sum(item[LOW] for item in sizes), seed=0)
    assert len(everything.steps[0].settings["overrides"]) == 2 * len(config.layers)
    assert nothing.steps[0].settings["overrides"] == {}
    assert allocation(config, parts, kl, sum(item[LOW] for item in sizes) - 1, seed=0) is None


def test_parts_cover_every_matrix_once(tiny_model):
    for tied in (True, False):
        config = tiny_model(tied=tied).config
        names = [name for part in parts_of(config) for name in part.names]
        assert sorted(names) == sorted(name for name, shape in config.tensor_shapes().items() if len(shape) == 2)


def test_sensitivities_round_one_part_at_a_time(tiny_model):
    model = tiny_model(layers=2)
    parts, seen = parts_of(model.config), []

    def kl_of(changed):
        packed = {n for n in model.config.tensor_shapes() if isinstance(changed.stored(n), PackedMatrix)}
        seen.append(packed)
        return float(len(seen)) - 1.5  # the first is below zero, as noise can make it

    told = []
    found = sensitivities(model, parts, kl_of, lambda done, total: told.append((done, total)))
    assert seen == [set(part.names) for part in parts]
    assert list(found.values()) == [0.0, *(index - 0.5 for index in range(1, len(parts)))]
    assert told[-1] == (len(parts), len(parts))

"""Channels, heads and layers that go: compensation against brute force, functions that must not change, shapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trilemma.core.errors import RecipeError, UnsupportedModelError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact, weights_bytes, write_artifact
from trilemma.runtime import EngineOptions, open_engine
from trilemma.search.predict import predict_bytes
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.calibration import Gram
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.prune.compensate import (
    bias_shift,
    eliminate,
    least_squares,
    mean_gram,
    output_error,
)
from trilemma.techniques.prune.depth import DepthSettings, PruneDepth, removable, search, without
from trilemma.techniques.prune.widths import find_slots, spread_by_error, spread_evenly
from trilemma.techniques.schemes import scheme_to_recipe


def recipe(technique, **settings):
    return Recipe(steps=(Step(technique=technique, settings=settings),))


def inputs(random_generator, tokens, columns):
    """Correlated inputs with means of their own."""
    x = torch.from_numpy(random_generator.standard_normal((tokens, columns)))
    return x @ torch.from_numpy(random_generator.standard_normal((columns, columns))) + 3 * torch.from_numpy(
        random_generator.standard_normal(columns)
    )


def gram_of(x):
    gram = Gram(x.shape[1])
    gram.matrix, gram.total = gram.matrix.double(), gram.total.double()
    gram.matrix += x.T @ x
    gram.total += x.sum(0)
    gram.tokens = len(x)
    return gram


def test_compensation_is_the_least_squares_solution(random_generator):
    x, weight = inputs(random_generator, 300, 14), torch.from_numpy(random_generator.standard_normal((5, 14)))
    keep = torch.from_numpy(np.sort(random_generator.permutation(14)[:9]))
    gram = mean_gram(gram_of(x), centred=False)
    kept = least_squares(weight, gram, keep, damping=1e-12)
    best = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    torch.testing.assert_close(kept, best, rtol=1e-5, atol=1e-7)
    error = (x[:, keep] @ kept.T - x @ weight.T).square().sum(1).mean()
    assert output_error(weight, gram, keep, kept) == pytest.approx(float(error), rel=1e-6)


def test_with_a_bias_it_is_the_least_squares_solution_with_a_column_of_ones(random_generator):
    x, weight = inputs(random_generator, 300, 11), torch.from_numpy(random_generator.standard_normal((4, 11)))
    keep = torch.from_numpy(np.sort(random_generator.permutation(11)[:6]))
    gram = gram_of(x)
    kept = least_squares(weight, mean_gram(gram, centred=True), keep, damping=1e-12)
    shift = bias_shift(weight, gram.total / gram.tokens, keep, kept)
    best = torch.linalg.lstsq(torch.cat((x[:, keep], torch.ones(300, 1).double()), 1), x @ weight.T).solution.T
    torch.testing.assert_close(kept, best[:, :-1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shift, best[:, -1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [1, 3])
def test_elimination_finds_the_block_that_costs_least_and_its_true_cost(random_generator, block):
    blocks = 6
    x = inputs(random_generator, 200, blocks * block)
    weight = torch.from_numpy(random_generator.standard_normal((5, blocks * block)))
    gram = mean_gram(gram_of(x), centred=False)
    found = eliminate(weight, gram, block, [1] * (blocks - 1), damping=1e-12)

    def cost(gone):
        keep = torch.tensor([c for c in range(blocks * block) if c // block not in gone])
        best = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution
        return float((x[:, keep] @ best - x @ weight.T).square().sum(1).mean())

    gone: list[int] = []
    for round_, (chosen,) in enumerate(found.order):
        costs = {b: cost([*gone, b]) for b in range(blocks) if b not in gone}
        assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-5)
        gone.append(chosen)
        assert found.errors[round_ + 1] == pytest.approx(cost(gone), rel=1e-5)
    assert found.first(2) == sorted(gone[:2])


def test_elimination_by_groups_takes_one_from_each(random_generator):
    x, weight = inputs(random_generator, 200, 12), torch.from_numpy(random_generator.standard_normal((4, 12)))
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    found = eliminate(weight, mean_gram(gram_of(x), centred=False), 2, [1], groups=groups)
    assert sorted(groups[list(found.order[0])].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("compensation", ["least-squares", "affine", "none"])
def test_removing_dead_channels_and_heads_changes_nothing(tiny_model, random_generator, compensation, windows, logits):
    """Channels whose way down is zero, channels that are never active, and a head that nobody listens to."""
    model = tiny_model(seed=int(random_generator.integers(1000)), ffn=64, kv_heads=4, heads=4)
    tokens = windows(model)
    dead, changed = {}, {}
    for layer in range(2):
        prefix = f"layers.{layer}"
        dead[layer] = random_generator.permutation(64)[:16]
        down = model.tensor(f"{prefix}.ffn.down.weight").copy()
        down[:, dead[layer][:8]] = 0
        up = model.tensor(f"{prefix}.ffn.up.weight").copy()
        up[dead[layer][8:]] = 0
        o = model.tensor(f"{prefix}.attention.o.weight").copy()
        head = int(random_generator.integers(4))
        o[:, 16 * head : 16 * head + 16] = 0
        changed |= {f"{prefix}.ffn.down.weight": down, f"{prefix}.ffn.up.weight": up, f"{prefix}.attention.o.weight": o}
    model = model.with_tensors(changed)
    settings = {"share": 0.25, "allocation": "uniform", "multiple": 16, "compensation": compensation, "damping": 1e-8}
    made = apply_recipe(model, recipe("prune-width", **settings), Build(calibration=tokens, threads=1))
    assert [(layer.ffn.hidden, layer.attention.heads) for layer in made.config.layers] == [(48, 3)] * 2
    fresh = windows(model)
    torch.testing.assert_close(logits(made, fresh), logits(model, fresh), rtol=1e-3, atol=2e-3)


def test_compensation_pays_and_global_allocation_takes_at_least_the_share(
    tiny_model, random_generator, windows, logits
):
    model = tiny_model(seed=int(random_generator.integers(1000)), ffn=96, layers=3)
    tokens = windows(model, count=24)
    build = Build(calibration=tokens, threads=1)
    settings = {"share": 0.4, "parts": "ffn", "multiple": 8}
    errors = {}
    for kind in ("least-squares", "none"):
        made = apply_recipe(model, recipe("prune-width", compensation=kind, **settings), build)
        errors[kind] = float((logits(made, tokens) - logits(model, tokens)).square().mean())
    assert errors["least-squares"] < errors["none"]
    made = apply_recipe(model, recipe("prune-width", **settings), build)
    widths = [layer.ffn.hidden for layer in made.config.layers]
    assert sum(widths) <= 0.6 * 3 * 96 < sum(widths) + 8
    assert all(width % 8 == 0 and width >= 24 for width in widths)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"share": 0.3, "multiple": 8}, {"ffn": 84, "heads": 6, "kv_heads": 3}),
        ({"share": 0.3, "parts": "heads", "head_unit": "query"}, {"heads": 6, "kv_heads": 2, "qkv_bias": True}),
        ({"share": 0.5, "parts": "heads", "compensation": "affine"}, {"heads": 4, "kv_heads": 4, "qkv_bias": True}),
        ({"share": 0.5, "parts": "ffn", "compensation": "bias"}, {"ffn": 100}),
    ],
)
def test_the_result_is_saved_and_runs_in_the_native_engine(
    tiny_model, random_generator, tmp_path, settings, sizes, windows, logits
):
    model = tiny_model(seed=int(random_generator.integers(1000)), layers=3, **sizes)
    tokens = windows(model)
    made = apply_recipe(model, recipe("prune-width", **settings), Build(calibration=tokens, threads=1))
    for layer in made.config.layers:
        assert layer.attention.heads % layer.attention.kv_heads == 0
    write_artifact(made, tmp_path / "a", Recipe())
    opened = read_artifact(tmp_path / "a")
    assert opened.config == made.config
    assert weights_bytes(opened) < weights_bytes(model)
    engine = open_engine(opened, options=EngineOptions(threads=1, kv_cache="f32"))
    try:
        ours = engine.logits(tokens[0].tolist())
    finally:
        engine.close()
    wanted = logits(made, tokens[:1])[0].numpy()
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * np.abs(wanted).max())


def test_more_than_the_floors_allow_is_refused_with_the_share_that_can_go(tiny_model, windows):
    model = tiny_model()
    with pytest.raises(RecipeError, match=r"90% can not be removed.*allow \d+% here"):
        apply_recipe(model, scheme_to_recipe("prune90"), Build(calibration=windows(model)))


def test_budget_goes_to_the_slots_of_least_error_for_their_weights(tiny_model, random_generator):
    """Against all ways to share out, on small curves that bend upwards."""
    config = tiny_model(layers=2, ffn=40).config
    slots = find_slots(config, "both", multiple=8, floor=0.2, head_unit="group")
    curves = {s: [0.0, *np.cumsum(np.sort(random_generator.uniform(0, 1, len(s.steps))))] for s in slots}
    total = sum(slot.parameters for slot in slots)
    chosen = spread_by_error(slots, curves, 0.3)
    removed = sum(slot.removed(steps) for slot, steps in chosen.items())
    assert removed >= 0.3 * total
    ways = itertools.product(*(range(len(slot.steps) + 1) for slot in slots))
    best = min(
        sum(curves[s][n] for s, n in zip(slots, way, strict=True))
        for way in ways
        if sum(s.removed(n) for s, n in zip(slots, way, strict=True)) >= removed
    )
    assert sum(curves[s][n] for s, n in chosen.items()) == pytest.approx(best)


def test_even_spreading_takes_the_nearest_width(tiny_model):
    config = tiny_model(ffn=80, heads=4, kv_heads=4).config
    slots = find_slots(config, "both", multiple=32, floor=0.25, head_unit="group")
    assert [slot.steps for slot in slots] == [(1, 1, 1), (16, 32)] * 2
    assert list(spread_evenly(slots, 0.3).values()) == [1, 1] * 2
    assert list(spread_evenly(slots, 0.55).values()) == [2, 2] * 2


def drop(model, gone):
    kept = [i for i in range(len(model.config.layers)) if i not in gone]
    config = model.config.model_copy(update={"layers": tuple(model.config.layers[i] for i in kept)})
    tensors = {}
    for name in config.tensor_shapes():
        old = name
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            old = f"layers.{kept[int(index)]}.{rest}"
        tensors[name] = model.tensor(old)
    return type(model)(config, model.source, replaced=tensors)


def test_the_layer_whose_absence_costs_least_kl_goes(tiny_model, random_generator, windows, logits):
    model = tiny_model(seed=int(random_generator.integers(1000)), layers=4)
    tokens = windows(model)
    build = Build(calibration=tokens, threads=1)

    def brute_force(*gone):
        """KL from the whole model to the one without these layers, built anew from its tensors."""
        p, q = (logits(m, tokens).log_softmax(-1) for m in (model, drop(model, gone)))
        return float((p.exp() * (p - q)).sum(-1).mean())

    gone = [index for index, _ in search(model, DepthSettings(share=0.5), build)]
    costs = [brute_force(i) for i in range(4)]
    assert gone[0] == int(np.argmin(costs))
    second = {i: brute_force(gone[0], i) for i in range(4) if i != gone[0]}
    assert gone[1] == min(second, key=second.__getitem__)
    made = apply_recipe(model, recipe("prune-depth", share=0.5), build)
    torch.testing.assert_close(logits(made, tokens), logits(drop(model, gone), tokens))


def test_parts_go_and_the_rest_is_renamed_with_what_was_replaced_and_how_it_runs(tiny_model, windows):
    model = apply_recipe(tiny_model(seed=3, layers=4), scheme_to_recipe("bf16"), Build())
    tokens = windows(model)
    made = apply_recipe(model, recipe("prune-depth", share=0.3, unit="parts"), Build(calibration=tokens, threads=1))
    gone = search(model, DepthSettings(share=0.3, unit="parts"), Build(calibration=tokens, threads=1))
    _, kept = without(model.config, gone)
    for name in made.config.linear_names():
        _, index, rest = name.split(".", 2)
        old = f"layers.{kept[int(index)]}.{rest}"
        np.testing.assert_array_equal(made.tensor(name), model.tensor(old))
        assert made.linear(name) == model.linear(old)
        assert made.format_of(name) == "bf16"


def test_one_layer_stays_whole(tiny_model, windows):
    config = tiny_model(layers=2).config
    assert len(removable(config, "layers", [])) == 2
    assert removable(config, "layers", [(0, "layer")]) == []
    assert removable(config, "parts", [(0, "attention")]) == [(0, "ffn")]
    model = tiny_model(layers=2)
    with pytest.raises(RecipeError, match=r"80%.*50% can"):
        apply_recipe(model, scheme_to_recipe("layers80"), Build(calibration=windows(model)))
    with pytest.raises(UnsupportedModelError, match="one layer"):
        apply_recipe(tiny_model(layers=1), scheme_to_recipe("layers25"), Build())
    assert PruneDepth().config_after(config, DepthSettings(share=0.5)).layers == config.layers[:1]


@pytest.mark.parametrize(("share", "left"), [(0.05, 5), (0.17, 5), (0.24, 5), (0.26, 4), (0.5, 3), (0.8, 1)])
def test_the_nearest_number_of_layers_goes(tiny_model, share, left, windows):
    model = tiny_model(layers=6)
    settings = DepthSettings(share=share, windows=1)
    assert len(PruneDepth().config_after(model.config, settings).layers) == left
    if share in (0.17, 0.26):
        build = Build(calibration=windows(model), threads=1)
        assert len(apply_recipe(model, recipe("prune-depth", share=share, windows=1), build).config.layers) == left


@pytest.mark.parametrize(
    "scheme", ["prune25", "prune25-even+W8A8", "ffn50+W4A8-g32", "layers25+W8A8", "kvheads1", "wanda50+W4A8-g32-kv8"]
)
def test_twins_and_predictions_have_the_shapes_of_the_real_thing(tiny_model, scheme, windows):
    model = tiny_model(layers=4, ffn=128, heads=4, kv_heads=4)
    found = scheme_to_recipe(scheme)
    made = apply_recipe(model, found, Build(calibration=windows(model), threads=1))
    twin, predicted = cost_twin(model, found), predict_bytes(model, found, 64)
    assert twin.run == made.run
    if predicted.exact:
        assert twin.config == made.config
        assert predicted.weights_bytes == weights_bytes(made)
    else:
        assert weights_bytes(twin) == pytest.approx(weights_bytes(made), rel=0.12)
        assert predicted.weights_bytes == weights_bytes(twin)
    for name in set(twin) & set(made):
        assert twin.format_of(name) == made.format_of(name), name

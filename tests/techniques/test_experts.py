"""Experts made of a dense block: the same function when all are active, and the nearest one when some are silent."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from trilemma import bench
from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import weights_bytes
from trilemma.model.config import Experts
from trilemma.search.predict import predict_bytes
from trilemma.techniques import TECHNIQUES, Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.restructure.partition import (
    chosen_experts,
    conditional_least_squares,
    expert_energy,
    fit_router,
    partition_channels,
)
from trilemma.techniques.schemes import scheme_to_recipe


def recipe(**settings):
    return Recipe(steps=(Step(technique="experts", settings={"multiple": 4, **settings}),))


@pytest.mark.parametrize("runtime", ["native", "torch"])
@pytest.mark.parametrize("router", ["linear", "glu"])
def test_with_all_experts_active_it_is_the_dense_model(tiny_model, tokens, runtime, router, engine_logits):
    model = tiny_model(seed=int(tokens[0, 0]), ffn=84)
    made = apply_recipe(model, recipe(count=5, active=5, router=router), Build(calibration=tokens, threads=1))
    assert all(isinstance(layer.ffn, Experts) and layer.ffn.router == router for layer in made.config.layers)
    wanted = engine_logits(model, tokens[0])
    np.testing.assert_allclose(engine_logits(made, tokens[0], runtime), wanted, atol=2e-5 * np.abs(wanted).max())


def test_both_engines_agree_when_some_are_silent(tiny_model, tokens, engine_logits):
    model = tiny_model(seed=int(tokens[0, 1]), ffn=84)
    made = apply_recipe(model, recipe(count=4, active=2, shared=0.1), Build(calibration=tokens, threads=1))
    native, torch_ = engine_logits(made, tokens[1]), engine_logits(made, tokens[1], "torch")
    assert np.quantile(np.abs(native - torch_), 0.9) <= 1e-4 * np.abs(torch_).max()


def test_more_active_experts_come_nearer(tiny_model, tokens, engine_logits):
    model = tiny_model(seed=7, ffn=84)
    wanted = engine_logits(model, tokens[0])

    def error(active: int, **more) -> float:
        made = apply_recipe(model, recipe(count=4, active=active, **more), Build(calibration=tokens, threads=1))
        return float(np.square(engine_logits(made, tokens[0]) - wanted).mean())

    assert error(1) > error(3) > error(4)
    assert error(2) < error(2, compensation=False)


def test_every_channel_has_one_place_and_experts_are_equal(random_generator):
    contributions = torch.from_numpy(random_generator.random((50, 37)).astype(np.float32))
    found = partition_channels(contributions, 4, 6, seed=1)
    assert sorted(found.order.tolist()) == list(range(37))
    assert [len(expert) for expert in found.experts] == [6] * 4
    energy = contributions.square().mean(0)
    assert energy[found.shared].min() >= energy[torch.cat(found.experts)].max()


def test_channels_that_speak_together_are_clustered(random_generator):
    groups = np.repeat(np.arange(4), 5)
    speaks = random_generator.integers(0, 4, 400)
    base = (speaks[:, None] == groups[None, :]) * random_generator.uniform(0.9, 1.1, (400, 20))
    shuffle = random_generator.permutation(20)
    found = partition_channels(torch.from_numpy(base[:, shuffle].astype(np.float32)), 4, 5)
    for expert in found.experts:
        assert len(set(groups[shuffle][expert.numpy()])) == 1


def test_channels_that_never_speak_gather_where_no_token_needs_them(random_generator):
    contributions = random_generator.uniform(0.5, 1.0, (300, 24)).astype(np.float32)
    quiet = random_generator.permutation(24)[:12]
    contributions[:, quiet] *= 1e-3
    found = partition_channels(torch.from_numpy(contributions), 4, 6, seed=int(quiet[0]))
    assert sorted(len(set(expert.tolist()) & set(quiet.tolist())) for expert in found.experts) == [0, 0, 6, 6]


def test_the_router_learns_who_speaks(random_generator):
    inputs = random_generator.standard_normal((600, 12)).astype(np.float32)
    truth = random_generator.standard_normal((5, 12)).astype(np.float32)
    energy = np.exp(2 * inputs @ truth.T).astype(np.float32)
    router = fit_router(torch.from_numpy(inputs), torch.from_numpy(energy))
    chosen = (torch.from_numpy(inputs) @ router.T).argmax(1).numpy()
    assert energy[np.arange(600), chosen].sum() > 0.97 * energy.max(1).sum()


def test_ties_go_to_the_lower_index():
    chosen = chosen_experts(torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]]), 2)
    assert chosen.tolist() == [[True, True, False], [False, True, True]]


def test_compensation_is_the_least_squares_solution(random_generator):
    hidden = random_generator.standard_normal((80, 9))
    masked = hidden * (random_generator.random((80, 9)) < 0.6)
    down = random_generator.standard_normal((4, 9))
    found, bias = conditional_least_squares(*(torch.from_numpy(x).float() for x in (hidden, masked, down)), 1e-9)
    design = np.concatenate([masked, np.ones((80, 1))], axis=1)
    wanted = np.linalg.lstsq(design, hidden @ down.T, rcond=None)[0]
    np.testing.assert_allclose(found.numpy().T, wanted[:-1], atol=1e-4)
    np.testing.assert_allclose(bias.numpy(), wanted[-1], atol=1e-4)


def test_energy_is_that_of_an_experts_channels(random_generator):
    contributions = torch.from_numpy(random_generator.random((10, 12)).astype(np.float32))
    partition = partition_channels(contributions, 3, 4)
    energy = expert_energy(contributions, partition)
    np.testing.assert_allclose(energy[:, 1], contributions[:, partition.experts[1]].square().sum(1), rtol=1e-6)


def test_experts_can_be_quantized_afterwards(tiny_model, tokens, engine_logits):
    model = tiny_model(seed=2, ffn=84)
    parts = Recipe(steps=(*recipe(count=4, active=2).steps, *scheme_to_recipe("W8A8-g32").steps))
    made = apply_recipe(model, parts, Build(calibration=tokens, threads=1))
    assert made.format_of("layers.0.ffn.experts.1.up.weight") == "int8-g32"
    assert np.isfinite(engine_logits(made, tokens[0])).all()


def test_what_can_not_be_done_is_refused(tiny_model, tokens):
    build = Build(calibration=tokens, threads=1)
    with pytest.raises(RecipeError, match="at most 4"):
        apply_recipe(tiny_model(), recipe(count=4, active=5), build)
    with pytest.raises(RecipeError, match="do not fit"):
        apply_recipe(tiny_model(ffn=12), recipe(count=8, active=2, multiple=16), build)
    packed = apply_recipe(tiny_model(), scheme_to_recipe("W8A8"), Build())
    with pytest.raises(RecipeError, match="already"):
        apply_recipe(packed, recipe(), build)
    made = apply_recipe(tiny_model(), recipe(count=4, active=2), build)
    assert TECHNIQUES.get("experts")().supports(made.config) is not None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "glu"},
        {"router": "auto"},
        {"active": 4},
        {"shared": 0.4, "compensation": False},
        {"multiple": 16},
    ],
)
@pytest.mark.parametrize("then", ["", "W4A8-g32", "bf16-kv8"])
def test_twins_and_predictions_are_the_real_shapes_and_bytes(tiny_model, tokens, settings, then):
    model = tiny_model(seed=int(tokens[0, 2]), ffn=92, dim=40)
    steps = recipe(**{"count": 4, "active": 2, **settings}).steps
    wanted = Recipe(steps=steps + (scheme_to_recipe(then).steps if then else ()))
    made = apply_recipe(model, wanted, Build(calibration=tokens, threads=1))
    twin, predicted = cost_twin(model, wanted), predict_bytes(model, wanted, 64)
    assert predicted.exact == (settings.get("router") != "auto")
    if predicted.exact:
        assert twin.config == made.config
        assert predicted.weights_bytes == weights_bytes(made) == weights_bytes(twin)
    assert twin.run == made.run
    for name in set(twin) & set(made):
        assert (twin.format_of(name), twin.linear(name)) == (made.format_of(name), made.linear(name)), name


def test_a_step_before_hands_its_format_on(tiny_model, tokens):
    model = tiny_model(ffn=84)
    wanted = Recipe(steps=(*scheme_to_recipe("bf16").steps, *recipe(count=4, active=2).steps))
    made = apply_recipe(model, wanted, Build(calibration=tokens, threads=1))
    twin = cost_twin(model, wanted)
    for name in made.config.product_names():
        expected = "f32" if name.endswith("router.weight") else "bf16"
        assert made.format_of(name) == twin.format_of(name) == made.linear(name).activation == expected
        assert twin.linear(name) == made.linear(name)


def test_shapes_without_weights_can_be_benched(tmp_path, shapes_path):
    config = json.loads((shapes_path / "SmolLM2-135M/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "vocab_size": 200}))
    schemes = ["W4A8-g32", "experts8x4+W4A8-g32"]
    report = bench(tmp_path, schemes=schemes, prompt_tokens=4, output_tokens=2, repetitions=1)
    dense, experts = (row.trial.measurements["weights_bytes"].value for row in report.rows)
    router = 16 * 576 * 2 + 576 * 4  # bf16 in whole panels of 16 rows; the bias that makes up for silent experts
    assert experts == dense + router


def test_what_can_not_be_done_is_refused_of_a_twin_too(tiny_model):
    with pytest.raises(RecipeError, match="at most 4"):
        cost_twin(tiny_model(), recipe(count=4, active=5))
    with pytest.raises(RecipeError, match="do not fit"):
        predict_bytes(tiny_model(ffn=12), recipe(count=8, active=2, multiple=16), 8)

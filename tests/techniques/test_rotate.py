"""Rotation: orthogonal at every size, the same logits in every family, and outliers that go away."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import hadamard

from family_cases import BASE, CASES
from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.model.checkpoint import read_checkpoint, write_checkpoint
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.orthogonal import Rotation, mix
from trilemma.techniques.schemes import scheme_to_recipe

TOLERANCE = 1e-4  # of the largest logit: f32 rounding, which layers of large random weights increase
OTHERS = {
    "llama": ("Llama", {**BASE, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", {**BASE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", BASE),
}


def rotate(**settings: object) -> Recipe:
    return Recipe(seed=5, steps=(Step(technique="rotate", settings=settings),))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 10, 12, 14, 36, 40, 96, 128, 135, 576, 1024])
def test_the_transform_is_orthogonal_and_even(n):
    matrix = mix(np.eye(n, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=2e-6)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert np.abs(matrix).max() <= np.sqrt(2 / n) + 1e-6
    if not n & (n - 1):
        np.testing.assert_allclose(matrix * np.sqrt(n), hadamard(n), atol=1e-5)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_groups_are_turned_by_themselves(keeps_mean, random_generator):
    order = random_generator.permutation(45)
    groups = [order[:1], order[1:3], order[3:15], order[15:]]
    turn = Rotation.random(groups, (7,), keeps_mean=keeps_mean)
    matrix = turn.turn(np.eye(45, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(45), atol=3e-6)
    which = np.empty(45)
    for at, group in enumerate(groups):
        which[group] = at
    assert not matrix[which[:, None] != which].any()
    x = random_generator.standard_normal((3, 45)).astype(np.float32)
    np.testing.assert_allclose(turn.turn(x), x @ matrix, atol=1e-5)
    np.testing.assert_allclose(turn.turn_rows(x.T), matrix.T @ x.T, atol=1e-5)
    if keeps_mean:
        np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-5)


def largest_difference(model, made, logits, generator) -> float:
    tokens = generator.integers(0, model.config.vocab_size, (2, 41)).astype(np.int32)
    before = logits(model, tokens)
    assert before.std() > 0.1  # else equality would say little
    return float((logits(made, tokens) - before).abs().max() / before.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", ["keep", "untie"])
@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_the_function_stays_the_same_in_every_family(case, tied, save_hf, logits, random_generator, tmp_path):
    kind, options = (CASES | OTHERS)[case]
    model = read_checkpoint(save_hf(kind, **options)[1])
    made = apply_recipe(model, rotate(tied=tied), Build())
    assert largest_difference(model, made, logits, random_generator) < TOLERANCE
    written = read_checkpoint(write_checkpoint(made, tmp_path / "written"))
    assert written.config == made.config  # it is still of its family
    assert largest_difference(model, written, logits, random_generator) < TOLERANCE
    stream_stays = "gemma" in case
    changed = {name for name in model if not np.array_equal(model.tensor(name), made.tensor(name))}
    assert "layers.1.attention.v.weight" in changed
    assert ("layers.1.ffn_norm.weight" in changed) != stream_stays
    assert made.config.tied == (model.config.tied and (tied == "keep" or stream_stays))


def test_experts_and_routers_of_every_kind(random_model, experts_config, logits, random_generator):
    for options in ({"shared_hidden": 20, "down_bias": True, "router": "glu"}, {"gates": "softmax"}):
        model = random_model(experts_config(**options), int(random_generator.integers(1000)))
        made = apply_recipe(model, rotate(tied="untie"), Build())
        assert largest_difference(model, made, logits, random_generator) < TOLERANCE


def test_parts_that_pruning_removed(tiny_model, logits, random_generator):
    model = tiny_model(layers=3, tied=False)
    layers = [layer.model_copy() for layer in model.config.layers]
    layers[0] = layers[0].model_copy(update={"attention": None})
    layers[1] = layers[1].model_copy(update={"ffn": None})
    model = model.with_config(model.config.model_copy(update={"layers": tuple(layers)}))
    made = apply_recipe(model, rotate(), Build())
    assert largest_difference(model, made, logits, random_generator) < TOLERANCE


def test_a_tied_head_turns_channels_of_equal_gain(tiny_model, logits, random_generator):
    model = tiny_model(dim=48)
    gains = np.repeat(np.array([0.5, 1.5, 2.0], np.float32), [30, 17, 1])
    model = model.with_tensors({"final_norm.weight": random_generator.permutation(gains)})
    made = apply_recipe(model, rotate(values=False), Build())
    assert largest_difference(model, made, logits, random_generator) < TOLERANCE
    gains = model.tensor("final_norm.weight")
    turned = np.linalg.lstsq(model.tensor("embedding.weight"), made.tensor("embedding.weight"), rcond=None)[0]
    equal = gains[:, None] == gains
    assert np.abs(turned[~equal]).max() < 1e-4
    assert (np.abs(turned[equal]) > 1e-4).mean() > 0.9
    np.testing.assert_array_equal(made.tensor("final_norm.weight"), gains)


def test_outliers_of_the_stream_are_spread(tiny_model):
    model = tiny_model(dim=96, tied=False)
    spikes = np.where(np.arange(96) == 17, 60, 1).astype(np.float32)
    model = model.with_tensors({"embedding.weight": model.tensor("embedding.weight") * spikes})
    made = apply_recipe(model, rotate(), Build())

    def largest_to_mean(which):
        size = np.abs(which.tensor("embedding.weight"))
        return float(np.median(size.max(1) / np.sqrt((size**2).mean(1))))

    assert largest_to_mean(model) > 6  # one channel has nearly all: sqrt(96) is the most
    assert largest_to_mean(made) < 2.5  # even to sqrt(2), where it has all


def test_what_is_left_alone_stays_where_it_lies(hearth_path):
    model = read_checkpoint(hearth_path)
    made = apply_recipe(model, rotate(stream=False), Build())
    for name in model:
        turned = name.endswith((".v.weight", ".o.weight"))
        assert made.format_of(name) == ("f32" if turned else model.format_of(name))
        assert (made.locate(name) is None) == (turned or model.locate(name) is None)


def test_norm_biases_and_gains_near_zero(save_hf, random_generator):
    kind, options = CASES["gpt_neox serial, no attention bias, tied"]
    model = read_checkpoint(save_hf(kind, **options)[1])
    gains = model.tensor("layers.1.attention_norm.weight").copy()
    gains[3] = 1e-7
    model = model.with_tensors({"layers.1.attention_norm.weight": gains})
    with pytest.raises(RecipeError, match=r"layers\.1\.attention_norm.*stream: false"):
        apply_recipe(model, rotate(), Build())
    apply_recipe(model, rotate(stream=False), Build())


def test_schemes_and_seeds(tiny_model):
    steps = scheme_to_recipe("rotate-untie+W4A8-g32").steps
    assert (steps[0].technique, steps[0].settings) == ("rotate", {"tied": "untie"})
    assert scheme_to_recipe("rotate+W4A8-g32-gptq").steps[0].settings == {}
    model = tiny_model(tied=False)
    one, again, other = (apply_recipe(model, rotate(), Build(seed=seed)) for seed in (1, 1, 2))
    name = "layers.0.ffn.up.weight"
    np.testing.assert_array_equal(one.tensor(name), again.tensor(name))
    assert np.abs(one.tensor(name) - other.tensor(name)).max() > 0.1


def test_packed_weights_are_refused(tiny_model):
    packed = apply_recipe(tiny_model(), scheme_to_recipe("W8A8"), Build())
    with pytest.raises(RecipeError, match="quantize afterwards"):
        apply_recipe(packed, rotate(), Build())

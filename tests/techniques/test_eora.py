"""Low-rank pairs: against the paper's own formula; what they give back; artifacts, engines and what refuses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag

from trilemma.core.errors import RecipeError, UnsupportedModelError
from trilemma.core.recipe import Recipe, Step
from trilemma.export import EXPORTERS
from trilemma.formats.artifact import read_artifact, weights_bytes, write_artifact
from trilemma.model.config import is_low_rank, is_router, low_rank_names
from trilemma.model.cost import matrix_macs_per_token, parameter_count
from trilemma.model.write import write_checkpoint
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.output_guide import guide_outputs
from trilemma.techniques.quantize import eora, gptaq
from trilemma.techniques.quantize.eora import EoraSettings, fitted_to, least_squares_pair, wanted_beyond, weigh_outputs
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.two_paths import Pair

SCHEME = "W3A8-g32-gptq+eora8"
REMAKING = ("W4A8-g32", "W4A8-g32-gptq", "prune25+bf16", "rotate+bf16", "smooth+W8A8-g32", "magnitude50")


def seen(rng: np.random.Generator, columns: int, tokens: int = 400) -> np.ndarray:
    """Correlated inputs of different energy (tokens, columns)."""
    mixed = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns)) / np.sqrt(columns)
    return mixed * np.exp(rng.standard_normal(columns))


def by_the_paper(wanted: np.ndarray, inputs: np.ndarray, rank: int) -> np.ndarray:
    """b a of the paper's algorithm: D Q', its best approximation of that rank, and back by the inverse of Q'."""
    values, vectors = np.linalg.eigh(inputs.T @ inputs)
    projection = vectors * np.sqrt(values)
    left, sizes, right = np.linalg.svd(wanted @ projection, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank] @ np.linalg.inv(projection)


@pytest.mark.parametrize("shape", [(24, 40), (41, 23), (17, 17)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_pair_is_that_of_the_paper(shape, rank, random_generator):
    inputs, wanted = seen(random_generator, shape[1]), random_generator.standard_normal(shape)
    hessian = torch.from_numpy(inputs.T @ inputs)
    a, b = least_squares_pair(torch.from_numpy(wanted), hessian, rank)
    assert a.shape == (rank, shape[1])
    assert b.shape == (shape[0], rank)
    np.testing.assert_allclose((b @ a).numpy(), by_the_paper(wanted, inputs, rank), atol=1e-8)
    inner = inputs @ a.numpy().T
    np.testing.assert_allclose((inner**2).sum(0), (inner**2).sum(0)[0], rtol=1e-6)  # one size in all channels


def test_iteration_finds_what_eigenvectors_do(monkeypatch, random_generator):
    inputs, wanted = seen(random_generator, 96), random_generator.standard_normal((160, 96))
    hessian, wide = torch.from_numpy(inputs.T @ inputs), torch.from_numpy(wanted)

    def left(a, b) -> float:
        return float(((wide - b @ a) @ hessian * (wide - b @ a)).sum())

    exact = left(*least_squares_pair(wide, hessian, 8))
    monkeypatch.setattr(eora, "_EXACT_ROWS", 0)
    assert exact <= left(*least_squares_pair(wide, hessian, 8)) < 1.001 * exact


def test_the_second_is_fitted_to_a_rounded_first(random_generator):
    inputs, wanted = seen(random_generator, 40), random_generator.standard_normal((24, 40))
    rough = random_generator.standard_normal((6, 40))
    b = fitted_to(*(torch.from_numpy(each) for each in (rough, wanted, inputs.T @ inputs)), 1e-9).numpy()
    wanted_b = np.linalg.lstsq(inputs @ rough.T, inputs @ wanted.T, rcond=None)[0].T
    np.testing.assert_allclose(b, wanted_b, atol=1e-6)


@pytest.mark.parametrize("block", [8, 24])
def test_outputs_are_weighed_by_what_answers_make_of_them(block, random_generator):
    """No pair of this rank has less error under blocks of moments than the cut of the weighed difference."""
    inputs, wanted = seen(random_generator, 40), random_generator.standard_normal((24, 40))
    gradients = seen(random_generator, 24)
    blocks = [gradients[:, first : first + block] for first in range(0, 24, block)]
    moments = torch.from_numpy(np.stack([each.T @ each for each in blocks]))
    hessian, wide = torch.from_numpy(inputs.T @ inputs), torch.from_numpy(wanted)
    a, _ = least_squares_pair(weigh_outputs(wide, moments, 1e-9), hessian, 5)
    error = (wide - fitted_to(a, wide, hessian, 1e-9) @ a).numpy()
    whole = block_diag(*moments.numpy())
    roots = np.linalg.cholesky(whole).T @ wanted @ np.linalg.cholesky(hessian.numpy())
    least = (np.linalg.svd(roots, compute_uv=False)[5:] ** 2).sum()
    assert np.trace(whole @ error @ hessian.numpy() @ error.T) == pytest.approx(least, rel=1e-3)
    assert weigh_outputs(wide, None, 1e-9) is wide


def test_wanted_are_the_outputs_of_the_unchanged_model(random_generator):
    """D X~ is nearest to W X + (R - R~) - Q X~: solved here by least squares over the tokens."""
    before, now = seen(random_generator, 12), seen(random_generator, 12)
    weight, kept = random_generator.standard_normal((2, 9, 12))
    drift = random_generator.standard_normal((400, 9))
    linear = torch.nn.Linear(12, 9, bias=False)
    pair = Pair(linear, "cpu", beside=True, drifts=True)
    pair.matrix, pair.cross = torch.from_numpy(now.T @ now), torch.from_numpy(before.T @ now)
    pair.drift, pair.tokens = torch.from_numpy(drift.T @ now), 400
    found = wanted_beyond(*(torch.from_numpy(each) for each in (weight, kept)), pair, EoraSettings(damping=1e-12))
    outputs = before @ weight.T + drift - now @ kept.T
    np.testing.assert_allclose(found, np.linalg.lstsq(now, outputs, rcond=None)[0].T, atol=1e-4)
    plain = EoraSettings(pull=0, drift=0)
    assert torch.equal(
        wanted_beyond(*map(torch.from_numpy, (weight, kept)), pair, plain), torch.from_numpy(weight - kept)
    )


@pytest.mark.parametrize(
    "scheme", [SCHEME, "W2A16-g32-asym+eora16", "W3A8-g32-guided+eora8-guided", "rotate+W3A8-g32-gptaq+eora8"]
)
def test_answers_come_back(scheme, tiny_model, windows, logits):
    model = tiny_model(seed=2, layers=3)
    text, other = windows(model, 24), windows(model)
    build = Build(text, threads=1)
    wanted = logits(model, other)

    def lost(scheme: str) -> float:
        return float((logits(apply_recipe(model, scheme_to_recipe(scheme), build), other) - wanted).pow(2).mean())

    assert lost(scheme) < 0.8 * lost(scheme.rsplit("+", 1)[0])


def test_what_guides_two_steps_is_made_once(tiny_model, tokens, monkeypatch):
    made = []

    def counted(model, build, rows):
        made.append(rows)
        return guide_outputs(model, build, rows)

    for place in (eora, gptaq):
        monkeypatch.setattr(place, "guide_outputs", counted)
    apply_recipe(tiny_model(), scheme_to_recipe("W4A8-g32-guided+eora8-guided"), Build(tokens, threads=1))
    assert made == [1024]


def test_more_rank_loses_less_and_costs_more(tiny_model, windows, logits):
    model = tiny_model(seed=4)
    text, other = windows(model, 24), windows(model)
    wanted, made = logits(model, other), []
    for rank in (2, 8, 20):
        made.append(apply_recipe(model, scheme_to_recipe(f"W2A16-g32-asym+eora{rank}"), Build(text, threads=1)))
    lost = [float((logits(each, other) - wanted).pow(2).mean()) for each in made]
    assert lost[0] > lost[1] > lost[2]
    sizes = [weights_bytes(each) for each in made]
    assert sizes[0] == sizes[1] < sizes[2]  # panels have 16 rows


def test_costs_of_the_pairs_are_counted(tiny_model):
    model = tiny_model()
    twin = cost_twin(model, scheme_to_recipe(SCHEME))
    shapes = model.config.tensor_shapes()
    more = 8 * sum(sum(shapes[name]) for name in model.config.linear_names())
    assert parameter_count(twin.config) == parameter_count(model.config) + more
    assert matrix_macs_per_token(twin.config) == matrix_macs_per_token(model.config) + more


@pytest.mark.parametrize("format_name", ["int8-g32", "bf16", "int4-g32", "f32"])
@pytest.mark.parametrize("weights", ["W3A8-g32-gptq", "W4A16-g32", "W8A8"])
def test_the_twin_is_what_comes_out(weights, format_name, tiny_model, tokens):
    model = tiny_model()
    steps = (*scheme_to_recipe(weights).steps, Step(technique="eora", settings={"rank": 6, "format": format_name}))
    made = apply_recipe(model, Recipe(steps=steps), Build(tokens, threads=1))
    twin = cost_twin(model, Recipe(steps=steps))
    assert made.config == twin.config
    assert all(layer.low_rank == 6 for layer in made.config.layers)
    for name in made.config.linear_names():
        assert made.format_of(name) == twin.format_of(name)
        assert made.linear(name) == twin.linear(name)
        assert (made.format_of(name) == format_name) or not is_low_rank(name)


def test_experts_have_pairs_and_routers_none(random_model, experts_config, windows, logits, engine_logits):
    model = random_model(experts_config(router="linear", shared_hidden=20), 3)
    text, other = windows(model, 24), windows(model)
    build, wanted = Build(text, threads=1), logits(model, other)
    quantize = Step(technique="rtn", settings={"weights": "int2-g32-asym", "activations": "f32"})
    steps = (quantize, Step(technique="eora", settings={"rank": 8}))
    plain, made = (apply_recipe(model, Recipe(steps=steps[:count]), build) for count in (1, 2))
    names = model.config.linear_names()
    for name in names:
        assert (low_rank_names(name)[0] in made.config.tensor_shapes()) is not is_router(name)
    off = [float((logits(each, other) - wanted).pow(2).mean()) for each in (plain, made)]
    assert off[1] < off[0]
    np.testing.assert_allclose(engine_logits(made, other[0]), engine_logits(made, other[0], "torch"), atol=1e-3)


def test_an_artifact_keeps_the_pairs(tiny_model, tokens, tmp_path, engine_logits):
    recipe = scheme_to_recipe(SCHEME)
    made = apply_recipe(tiny_model(seed=1), recipe, Build(tokens, threads=1))
    write_artifact(made, tmp_path / "artifact", recipe)
    again = read_artifact(tmp_path / "artifact")
    assert again.config == made.config
    for name in made.names():
        np.testing.assert_array_equal(again.tensor(name), made.tensor(name))
        assert again.linear(name) == made.linear(name)
    np.testing.assert_array_equal(engine_logits(again, tokens[0]), engine_logits(made, tokens[0]))


def test_a_walk_that_was_stopped_goes_on(tiny_model, tokens, tmp_path):
    model, recipe = tiny_model(seed=1, layers=3), scheme_to_recipe(SCHEME)
    whole = apply_recipe(model, recipe, Build(tokens, threads=1))

    def stop(done: int, total: int, what: str) -> None:
        if "fitting" in what and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_recipe(model, recipe, Build(tokens, threads=1, work=tmp_path, progress=stop))
    said: list[str] = []
    build = Build(tokens, threads=1, work=tmp_path, progress=lambda done, total, what: said.append(what))
    again = apply_recipe(model, recipe, build)
    assert not any(what in ("layer 0: fitting pairs", "layer 1: choosing codes") for what in said)
    for name in whole.names():
        np.testing.assert_array_equal(again.tensor(name), whole.tensor(name), err_msg=name)


@pytest.mark.parametrize("scheme", ["eora8", "eora8+W4A8-g32", "W4A8-g32-gptq+eora8+eora8"])
def test_a_place_where_nothing_was_quantized_is_refused(scheme, tiny_model, tokens):
    with pytest.raises((RecipeError, UnsupportedModelError), match="eora"):
        apply_recipe(tiny_model(), scheme_to_recipe(scheme), Build(tokens, threads=1))


@pytest.mark.parametrize("scheme", ["W4A8-g32-gptq+eora0", "W4A8-g32-gptq+eora32", "W4A8-g32-gptq+eora4000"])
def test_a_rank_that_is_none_is_refused(scheme, tiny_model, tokens):
    with pytest.raises(RecipeError, match="rank"):
        apply_recipe(tiny_model(), scheme_to_recipe(scheme), Build(tokens, threads=1))


def test_what_others_can_not_express_is_refused(tiny_model, tokens, tmp_path):
    made = apply_recipe(tiny_model(), scheme_to_recipe("W4A8-g32+eora8"), Build(tokens, threads=1))
    for exporter in EXPORTERS.names():
        with pytest.raises(UnsupportedModelError, match=r"low-rank pairs|no equivalent"):
            EXPORTERS.get(exporter)(made, tmp_path / exporter)
    with pytest.raises(UnsupportedModelError, match="no equivalent"):
        write_checkpoint(made, tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", REMAKING)
def test_a_corrected_model_is_not_quantized_again(scheme, tiny_model, tokens):
    made = apply_recipe(tiny_model(), scheme_to_recipe("W4A8-g32+eora8"), Build(tokens, threads=1))
    with pytest.raises(RecipeError, match=r"[Ss]tart from the unquantized model"):
        apply_recipe(made, scheme_to_recipe(scheme), Build(tokens, threads=1))


def test_scales_and_norms_learn_behind_the_pairs(tiny_model, tokens, logits):
    model = tiny_model(seed=1)
    wanted = logits(model, tokens)
    made = [
        apply_recipe(model, scheme_to_recipe(f"W2A16-g32-asym+eora8{more}"), Build(tokens, threads=1))
        for more in ("", "+scales20", "+tune20")
    ]
    off = [float((logits(each, tokens) - wanted).pow(2).mean()) for each in made]
    assert off[1] < off[0]
    assert off[2] < off[0]


def test_layers_go_with_their_pairs(tiny_model, tokens, logits):
    made = apply_recipe(tiny_model(layers=4), scheme_to_recipe("W4A8-g32+eora8+layers25"), Build(tokens, threads=1))
    assert len(made.config.layers) == 3
    assert all(layer.low_rank == 8 for layer in made.config.layers)
    assert torch.isfinite(logits(made, tokens)).all()

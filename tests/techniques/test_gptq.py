"""GPTQ against a brute-force oracle that inverts anew after every column, and what it is for: less output error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS
from trilemma.formats.pack import unpack
from trilemma.formats.quantize import find_grid, quantize_rtn
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.calibration import Gram, calibrate_layers, input_groups, round_activations
from trilemma.techniques.quantize.gptq import Feedback, GptqSettings, gptq_codes, inverse_factor, quantize_gptq
from trilemma.techniques.schemes import scheme_to_recipe

# (out, in): several groups, a ragged last one, several blocks
SHAPES = [(7, 70), (5, 96), (3, 200)]
FORMATS_TESTED = ["int4-g32", "int4-g64", "int4-g32-asym", "int8-g32", "int8-channel", "int4-g32-k", "int6-g16-k",
                  "nl4-g32", "int3-g16", "int2-g32-asym"]  # fmt: skip


def inputs_with_structure(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    """Correlated columns of very different energy, as activations have."""
    mixed = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns)) / np.sqrt(columns)
    return mixed * np.exp(rng.standard_normal(columns)) + 0.3


def brute_force(weight, hessian, scales, minima, spec, damping, order):
    """Optimal brain quantization in a given order: invert what remains anew after every column. (out, in) codes."""
    legal = spec.legal_codes[spec.legal_codes >= -127].astype(np.float64)
    h = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    work, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape, np.int64)
    remaining = list(order)
    size = spec.group_size(weight.shape[1])
    while remaining:
        column, *remaining = remaining
        inverse = np.linalg.inv(h[np.ix_([column, *remaining], [column, *remaining])])
        scale = scales[:, column // size].astype(np.float64)
        shift = 0.0 if minima is None else minima[:, column // size].astype(np.float64)
        values = (work[:, column] - shift) / scale
        codes[:, column] = legal[np.abs(values[:, None] - legal).argmin(axis=1)]
        error = work[:, column] - (codes[:, column] * scale + shift)
        work[:, remaining] -= np.outer(error, inverse[0, 1:]) / inverse[0, 0]
    return codes


def double_counted(weight, hessian, scales, spec, damping, block):
    """The known bug: at the end of a block, errors are taken again from columns that had them already."""
    upper = inverse_factor(torch.from_numpy(hessian), damping).numpy()
    work, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape, np.int64)
    size = spec.group_size(weight.shape[1])
    for first in range(0, weight.shape[1], block):
        errors = np.zeros((len(weight), block))
        last = min(first + block, weight.shape[1])
        for column in range(first, last):
            scale = scales[:, column // size].astype(np.float64)
            codes[:, column] = np.clip(np.rint(work[:, column] / scale), *spec.code_range)
            error = (work[:, column] - codes[:, column] * scale) / upper[column, column]
            work[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])  # all columns, not the block's
            errors[:, column - first] = error
        work[:, last:] -= errors[:, : last - first] @ upper[first:last, last:]
    return codes


def problem(rng, shape, name):
    spec = FORMATS.get(name)
    weight = rng.standard_normal(shape).astype(np.float32)
    x = inputs_with_structure(rng, 400, shape[1])
    hessian = 2 * x.T @ x / len(x)
    grid = find_grid(weight, spec, scale="mse", importance=np.diag(hessian).astype(np.float32))
    return spec, weight, x, hessian, grid.steps(), grid.offsets()


def run(weight, hessian, scales, minima, spec, **settings):
    shift = None if minima is None else torch.from_numpy(minima.astype(np.float64))
    scale = torch.from_numpy(scales.astype(np.float64))
    block = settings.pop("block", 128)
    feedback = Feedback.of(torch.from_numpy(hessian), **settings)
    return gptq_codes(torch.from_numpy(weight), feedback, scale, shift, spec, block=block).numpy()


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS_TESTED)
def test_codes_equal_brute_force(name, shape, activation_order, random_generator):
    spec, weight, _, hessian, scales, minima = problem(random_generator, shape, name)
    order = np.argsort(-np.diag(hessian), kind="stable") if activation_order else np.arange(shape[1])
    wanted = brute_force(weight, hessian, scales, minima, spec, 0.01, order)
    for block in (1, 24, 128):  # within a group, across groups, everything at once
        found = run(weight, hessian, scales, minima, spec, block=block, activation_order=activation_order)
        assert (found == wanted).mean() > 0.995  # a value half-way between two codes may fall to either side
        assert np.abs(found - wanted).max() <= 1


def test_errors_are_not_counted_twice_where_blocks_meet(random_generator):
    spec, weight, x, hessian, scales, minima = problem(random_generator, (24, 128), "int4-g32")
    right = brute_force(weight, hessian, scales, minima, spec, 0.01, np.arange(128))
    found = run(weight, hessian, scales, minima, spec, block=32, activation_order=False)
    wrong = double_counted(weight, hessian, scales, spec, 0.01, 32)
    assert (found == right).mean() > 0.995
    assert (wrong == right).mean() < 0.95  # so this case would see the bug

    def output_error(codes):
        return np.square(x @ (codes * np.repeat(scales.astype(np.float64), 32, axis=1) - weight).T).mean()

    assert output_error(found) < output_error(wrong)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "int4-g64-asym", "int8-channel", "int4-g32-k", "int5-g32-k"])
def test_output_error_is_less_than_that_of_rounding(name, activation_order, random_generator):
    spec, weight, x, hessian, _, _ = problem(random_generator, (40, 200), name)
    settings = GptqSettings(weights=name, activation_order=activation_order)
    found = quantize_gptq(weight, torch.from_numpy(hessian.astype(np.float32)), spec, settings)
    rounded = quantize_rtn(weight, spec, scale="mse", importance=np.diag(hessian).astype(np.float32))

    def output_error(matrix):
        return np.square(x @ (matrix.dequantize() - weight).T).mean()

    assert output_error(found) < 0.8 * output_error(rounded)


def test_inputs_that_calibration_never_saw_are_rounded_to_nearest(random_generator):
    spec, weight, _, hessian, _, _ = problem(random_generator, (6, 64), "int4-g32")
    dead = [3, 17, 40]
    hessian[dead], hessian[:, dead] = 0, 0
    found = quantize_gptq(weight, torch.from_numpy(hessian.astype(np.float32)), spec, GptqSettings(weights="int4-g32"))
    values = found.dequantize()
    assert np.isfinite(values).all()
    step = np.abs(np.repeat(found.scales.astype(np.float32), 32, axis=1))[:, dead]
    inside = np.abs(weight[:, dead]) < 6 * step  # beyond, codes are at the end of their range
    assert (np.abs(values - weight)[:, dead] <= 0.501 * step)[inside].all()


def test_one_token_and_no_token_of_calibration_still_work(random_generator):
    weight = random_generator.standard_normal((4, 64)).astype(np.float32)
    x = random_generator.standard_normal((1, 64)).astype(np.float32)
    settings, spec = GptqSettings(weights="int4-g32"), FORMATS.get("int4-g32")
    for hessian in (2 * x.T @ x, np.zeros((64, 64), np.float32)):
        assert np.isfinite(quantize_gptq(weight, torch.from_numpy(hessian), spec, settings).dequantize()).all()


def test_the_factor_is_that_of_the_damped_inverse_even_when_f32_is_not_enough(random_generator):
    x = random_generator.standard_normal((20, 60)) * np.logspace(-5, 5, 60)
    hessian = (2 * x.T @ x).astype(np.float32)
    upper = inverse_factor(torch.from_numpy(hessian), 1e-9)
    assert torch.isfinite(upper).all()
    assert (upper.diagonal() > 0).all()
    assert (upper.tril(-1) == 0).all()
    well = hessian[:10, :10].astype(np.float64) + np.eye(10)
    found = inverse_factor(torch.from_numpy(well), 0.01).numpy()
    damped = well + 0.01 * np.diag(well).mean() * np.eye(10)
    np.testing.assert_allclose(found.T @ found @ damped, np.eye(10), atol=1e-6)


def test_input_groups_name_every_matrix_once(tiny_model):
    config = tiny_model(layers=3).config
    names = [name for index in range(3) for group in input_groups(config, index) for name in group]
    assert sorted(names) == sorted(config.linear_names())


def test_grams_are_those_of_the_inputs_and_later_layers_see_the_changed_ones(tiny_model, random_generator):
    """Layer 1's statistics must come from layer 0 as replaced."""
    from trilemma.model.decoder import Decoder

    model = tiny_model(seed=2)
    windows = random_generator.integers(0, 97, (5, 20)).astype(np.int32)
    seen: dict[str, Gram] = {}
    changed = model.tensor("layers.0.ffn.down.weight") * 0.5

    def replace(grams):
        seen.update(grams)
        return {"layers.0.ffn.down.weight": changed} if "layers.0.ffn.down.weight" in grams else {}

    made = calibrate_layers(model, Build(calibration=windows), {}, replace)
    np.testing.assert_array_equal(made.tensor("layers.0.ffn.down.weight"), changed)
    decoder, captured = Decoder.from_model(made), {}
    for path, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: captured.__setitem__(path, args[0]))
    with torch.no_grad():
        decoder(torch.from_numpy(windows.astype(np.int64)))
    for name in model.config.linear_names():
        x = captured[name.removesuffix(".weight")].reshape(-1, captured[name.removesuffix(".weight")].shape[-1])
        np.testing.assert_allclose(seen[name].matrix.numpy(), (x.T @ x).numpy(), rtol=2e-4, atol=2e-3)
        assert seen[name].tokens == 100


def test_rounded_activations_equal_a_loop(random_generator):
    x = random_generator.standard_normal((2, 3, 70)).astype(np.float32)
    x[0, 0, :32] = 0
    found = round_activations(torch.from_numpy(x)).numpy()
    for first in (0, 32, 64):
        part = x[..., first : first + 32]
        scale = np.abs(part).max(-1, keepdims=True) / np.float32(127)
        wanted = np.rint(part / np.where(scale == 0, 1, scale)) * scale
        np.testing.assert_allclose(found[..., first : first + 32], wanted, atol=np.abs(part).max() / 126)
        assert (np.abs(found[..., first : first + 32] - wanted) > 1e-6).mean() < 0.01


def test_a_whole_model_gets_better_than_by_rounding(tiny_model, random_generator):
    from trilemma.model.decoder import Decoder

    errors = {"W4A8-g32-e16": 0.0, "W4A8-g32-gptq-e16": 0.0}
    for seed in range(4):
        model = tiny_model(seed=seed, dim=64, ffn=96)
        windows = random_generator.integers(0, 97, (24, 48)).astype(np.int32)
        tokens = torch.from_numpy(random_generator.integers(0, 97, (12, 48)).astype(np.int64))
        with torch.no_grad():
            reference = Decoder.from_model(model)(tokens)
            for scheme in errors:
                made = apply_recipe(model, scheme_to_recipe(scheme), Build(calibration=windows))
                errors[scheme] += float((Decoder.from_model(made)(tokens) - reference).square().mean())
    assert errors["W4A8-g32-gptq-e16"] < 0.95 * errors["W4A8-g32-e16"]


def test_the_same_seed_and_threads_give_the_same_bytes(tiny_model, random_generator):
    model = tiny_model(seed=5)
    windows = random_generator.integers(0, 97, (8, 32)).astype(np.int32)
    recipe = scheme_to_recipe("W4A8-g64-asym-gptq")
    made = [apply_recipe(model, recipe, Build(calibration=windows, threads=2)) for _ in range(2)]
    for name in model.config.linear_names():
        first, second = (unpack(model_.stored(name)) for model_ in made)
        np.testing.assert_array_equal(first.codes, second.codes)
        np.testing.assert_array_equal(first.scales, second.scales)


@pytest.mark.parametrize(
    ("windows", "why"),
    [
        (None, "needs calibration text"),
        (np.zeros((0, 8), np.int32), "needs calibration text"),
        (np.full((2, 8), 97, np.int32), "vocabulary has 97"),
        (np.full((2, 8), -1, np.int32), "token -1"),
        (np.zeros((1, 65), np.int32), "context is 64"),
    ],
)
def test_calibration_that_can_not_be_used_is_refused(windows, why, tiny_model):
    with pytest.raises(RecipeError, match=why):
        apply_recipe(tiny_model(), scheme_to_recipe("W4A8-g32-gptq"), Build(calibration=windows))


def test_activations_that_are_not_finite_are_refused(tiny_model):
    model = tiny_model()
    huge = model.with_tensors({"layers.0.ffn.up.weight": model.tensor("layers.0.ffn.up.weight") * np.float32(3e38)})
    with pytest.raises(RecipeError, match="not finite"):
        apply_recipe(huge, scheme_to_recipe("W4A8-g32-gptq"), Build(calibration=np.ones((2, 8), np.int32)))

"""Learned rounding: begins with the codes it is given, gradients of the textbook, and a smaller error in the end."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from torch import nn

from trilemma.core.errors import StoppedError
from trilemma.core.recipe import Recipe
from trilemma.formats import FORMATS
from trilemma.formats.pack import PackedMatrix, unpack
from trilemma.formats.quantize import fit_grid, quantize_rtn, usable_codes
from trilemma.model.decoder import layer_from_model
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.learned_rounding import is_learned, learn_rounding, learned_matrix
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.training.optimizers import SignDescent

TWO_LEVELS = ["int4-g32-k", "int6-g16-k"]
TESTED = ["int4-g32", "int4-g64-asym", "int5-g32", "int8-g32"]


def made_linear(rng: np.random.Generator, name: str, shape: tuple[int, int]):
    weight = (rng.standard_normal(shape) * 0.03).astype(np.float32)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = torch.from_numpy(weight.copy())
    return weight, linear, quantize_rtn(weight, FORMATS.get(name), scale="mse")


CASES = [(name, shape) for name in TESTED for shape in ((7, 70), (3, 200))] + [(name, (3, 512)) for name in TWO_LEVELS]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_it_begins_with_the_codes_that_it_is_given(name, shape, random_generator):
    _, linear, start = made_linear(random_generator, name, shape)
    low, high = usable_codes(start.spec)
    moved = start.codes + random_generator.integers(-1, 2, shape)  # as GPTQ: not always the nearest
    start.codes[...] = np.clip(moved, low, high)
    learn_rounding(linear, start)
    np.testing.assert_array_equal(linear.weight.detach().numpy(), start.dequantize())
    kept = learned_matrix(linear)
    np.testing.assert_array_equal(kept.codes, start.codes)
    np.testing.assert_array_equal(kept.scales, start.scales)
    names = [path for path, _ in linear.named_parameters()]
    assert (
        sum(is_learned(path, True) for path in names)
        == len(names)
        == (1 if name in TWO_LEVELS else 2 if start.spec.symmetric else 3)
    )
    assert sum(is_learned(path, False) for path in names) == 1


@pytest.mark.parametrize("name", TESTED)
def test_what_is_learned_is_what_is_stored_and_v_moves_by_one_code_at_most(name, random_generator):
    weight, linear, start = made_linear(random_generator, name, (5, 90))
    learn_rounding(linear, start)
    parameters = dict(linear.named_parameters())
    with torch.no_grad():
        for path, parameter in parameters.items():
            size = 2.0 if path.endswith("original0") else 0.1
            parameter.copy_(torch.from_numpy(random_generator.uniform(-size, size, parameter.shape)))
        parameters["parametrizations.weight.original0"].clamp_(-2, 2)
    stored = learned_matrix(linear)
    np.testing.assert_array_equal(linear.weight.detach().numpy(), stored.dequantize())
    low, high = usable_codes(start.spec)
    assert stored.codes.min() >= low
    assert stored.codes.max() <= high
    size = start.spec.group_size(90)
    scales = np.repeat(stored.scales.astype(np.float64), size, axis=1)[:, :90]
    minima = 0 if stored.minima is None else np.repeat(stored.minima.astype(np.float64), size, axis=1)[:, :90]
    exact = np.clip((weight - minima) / scales, low, high)
    assert np.abs(stored.codes - exact).max() <= 1 + 1e-3


def test_gradients_are_those_of_the_paper(random_generator):
    """dW'/dv = s inside the range and 0 outside; dW'/d(factor) = s (code - w / s) inside, s code at the ends."""
    weight, linear, start = made_linear(random_generator, "int4-g32", (4, 64))
    start.scales[...] = (start.scales.astype(np.float32) * 0.6).astype(np.float16)  # some weights lie outside
    exact = weight / np.repeat(start.scales.astype(np.float64), 32, axis=1)
    codes = np.clip(np.rint(exact), -8, 7)
    start.codes[...] = codes
    learn_rounding(linear, start)
    toward = random_generator.standard_normal((4, 64))
    (linear.weight * torch.from_numpy(toward).float()).sum().backward()
    v, factor = linear.parameters()
    scales = np.repeat(start.scales.astype(np.float64), 32, axis=1)
    inside = np.abs(exact - codes) <= 0.5
    assert 0 < inside.mean() < 1
    wanted_v = np.where(inside, toward * scales, 0)
    wanted = (toward * scales * np.where(inside, codes - exact, codes)).reshape(4, 2, 32).sum(-1)
    far = np.abs(np.abs(exact - codes) - 0.5) > 1e-3  # not on the edge
    np.testing.assert_allclose(v.grad.numpy()[far], wanted_v[far], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(factor.grad.numpy(), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_sign_descent_takes_steps_of_one_length():
    x = nn.Parameter(torch.tensor([3.0, -2.0, 0.0]))
    optimizer = SignDescent([x], 0.25)
    (x * torch.tensor([5.0, -0.01, 0.0])).sum().backward()
    optimizer.step()
    assert x.tolist() == [2.75, -1.75, 0.0]


def layer_error(model, original, tokens) -> float:
    """Mean squared error of the first layer's output, on inputs of the quantized and of the original embedding."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    outputs = []
    for which in (model, original):
        x = torch.from_numpy(which.tensor("embedding.weight"))[ids]
        with torch.no_grad():
            outputs.append(layer_from_model(which, 0)(x))
    return float((outputs[0] - outputs[1]).square().mean())


@pytest.mark.parametrize("suffix", ["", "-asym"])
def test_the_layer_is_nearer_to_the_original_than_with_gptq(tiny_model, windows, suffix):
    original = tiny_model(seed=int(windows(tiny_model(), 1, 2)[0, 0]))
    build = Build(calibration=windows(original, 12), threads=1)
    (step,) = scheme_to_recipe(f"W4A16-g32{suffix}-sign").steps
    short = step.model_copy(update={"settings": step.settings | {"steps": 120}})
    learned = apply_recipe(original, Recipe(steps=(short,)), build)
    gptq = apply_recipe(original, scheme_to_recipe(f"W4A16-g32{suffix}-gptq"), build)
    assert learned.format_of("layers.0.ffn.up.weight") == f"int4-g32{suffix}"
    assert layer_error(learned, original, build.calibration) < 0.97 * layer_error(gptq, original, build.calibration)


def test_ctrl_c_stops_it(tiny_model, tokens):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(done: int, total: int, what: str) -> None:
        if "step 3/" in what:
            signal.raise_signal(signal.SIGINT)

    model, build = tiny_model(), Build(calibration=tokens, threads=1, progress=stop)
    try:
        with pytest.raises(StoppedError, match="layer 0"):
            apply_recipe(model, scheme_to_recipe("W4A8-g32-sign"), build)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ranges_can_be_left_alone(tiny_model, tokens):
    recipe = scheme_to_recipe("W4A8-g64-sign")
    settings = recipe.steps[0].settings | {"ranges": False, "steps": 8, "start": "nearest", "scale": "absmax"}
    step = recipe.steps[0].model_copy(update={"settings": settings})
    model = tiny_model(seed=2)
    made = apply_recipe(model, recipe.model_copy(update={"steps": (step,)}), Build(calibration=tokens, threads=1))
    stored = made.stored("layers.1.attention.q.weight")
    assert isinstance(stored, PackedMatrix)
    scales, _ = fit_grid(model.tensor("layers.1.attention.q.weight"), stored.spec)
    np.testing.assert_array_equal(unpack(stored).scales, scales)

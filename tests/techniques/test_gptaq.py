"""Codes towards the unchanged model: each part against a dense oracle; then answers closer to the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.pack import pack, unpack
from trilemma.formats.quantize import fit_grid, quantize_rtn
from trilemma.model.decoder import Decoder
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.calibration import round_activations
from trilemma.techniques.output_guide import guide_outputs
from trilemma.techniques.quantize.assignment import assign_runs
from trilemma.techniques.quantize.gptaq import GptaqSettings, missing_outputs, quantize_gptaq
from trilemma.techniques.quantize.gptq import Feedback, find_feedback, gptq_codes
from trilemma.techniques.quantize.refit import refit_scales
from trilemma.techniques.quantize.two_sided import two_sided_codes
from trilemma.techniques.two_paths import Pair, calibrate_beside


def second_moment(rng: np.random.Generator, size: int) -> np.ndarray:
    """Of correlated values of different energy."""
    rows = rng.standard_normal((4 * size, size)) @ rng.standard_normal((size, size)) / np.sqrt(size)
    rows *= np.exp(0.5 * rng.standard_normal(size))
    return rows.T @ rows / len(rows)


def damped(moment: np.ndarray, share: float) -> np.ndarray:
    return moment + share * np.diag(moment).mean() * np.eye(len(moment))


def weighed_error(error: np.ndarray, hessian: np.ndarray, moment: np.ndarray) -> float:
    return float(np.trace(moment @ error @ hessian @ error.T))


def one_by_one(weight, hessian, moment, scales, minima, spec, damping):
    """Optimal brain quantization of all entries with the full Hessian G x H, inverted anew for every entry."""
    whole = np.kron(damped(moment, damping), damped(hessian, damping))
    rows, columns = (np.argsort(-np.diag(each), kind="stable") for each in (moment, hessian))
    width = len(hessian)
    remaining = [row * width + column for row in rows for column in columns]
    work, codes = weight.astype(np.float64).ravel().copy(), np.zeros(weight.size, np.int64)
    while remaining:
        at, *remaining = remaining
        inverse = np.linalg.inv(whole[np.ix_([at, *remaining], [at, *remaining])])
        group = at % width // spec.group_size(width)
        scale = float(scales[at // width, group])
        shift = 0.0 if minima is None else float(minima[at // width, group])
        codes[at] = spec.legal_codes[np.abs((work[at] - shift) / scale - spec.legal_codes.astype(np.float64)).argmin()]
        error = work[at] - (codes[at] * scale + shift)
        work[remaining] -= error * inverse[0, 1:] / inverse[0, 0]
    return codes.reshape(weight.shape)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "nl4-g32"])
def test_two_sided_codes_are_those_of_the_whole_hessian(name, random_generator):
    spec, shape = FORMATS.get(name), (5, 40)  # two groups, the last one short
    weight = random_generator.standard_normal(shape).astype(np.float32)
    hessian, moment = second_moment(random_generator, 40), second_moment(random_generator, 5)
    scales, minima = fit_grid(weight, spec, scale="mse")
    wanted = one_by_one(weight, hessian, moment, scales, minima, spec, 0.01)
    shift = None if minima is None else torch.from_numpy(minima.astype(np.float64))
    for block in (1, 2, 128):
        found = two_sided_codes(
            torch.from_numpy(weight), Feedback.of(torch.from_numpy(hessian)), torch.from_numpy(moment),
            torch.from_numpy(scales.astype(np.float64)), shift, spec, damping=0.01, block=block,
        ).numpy()  # fmt: skip
        assert (found == wanted).mean() > 0.98  # a value half-way between two codes may fall to either side


def test_two_sided_codes_have_less_weighed_error_than_rows_alone(random_generator):
    spec = FORMATS.get("int4-g32")
    weight = random_generator.standard_normal((48, 64)).astype(np.float32)
    hessian, moment = second_moment(random_generator, 64), second_moment(random_generator, 48)
    scales, _ = fit_grid(weight, spec, scale="mse")
    args = torch.from_numpy(weight), Feedback.of(torch.from_numpy(hessian))
    scale = torch.from_numpy(scales.astype(np.float64))
    both = two_sided_codes(*args, torch.from_numpy(moment), scale, None, spec)
    alone = gptq_codes(*args, scale, None, spec)
    steps = np.repeat(scales.astype(np.float64), 32, axis=1)
    errors = [weighed_error(codes.numpy() * steps - weight, hessian, moment) for codes in (both, alone)]
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("minima", [False, True])
def test_refitted_scales_are_the_dense_least_squares(guided, minima, random_generator):
    """Of eight problems together: a single one may be too badly conditioned for the steps that are allowed."""
    missing, gained = np.sum([refit_errors(guided, minima, random_generator) for _ in range(8)], axis=0)
    assert missing <= 0.05 * gained + 1e-9


def refit_errors(guided, minima, random_generator):
    """What the refit leaves above the least squares' error, and what the least squares take off the start's."""
    rows, columns, size = 4, 20, 8  # the last group is short
    weight = random_generator.standard_normal((rows, columns))
    codes = random_generator.integers(0 if minima else -8, 8, (rows, columns)).astype(np.float64)
    hessian, moment = second_moment(random_generator, columns), second_moment(random_generator, rows)
    left = np.linalg.cholesky(moment if guided else np.eye(rows)).T
    right = np.linalg.cholesky(hessian)
    kinds = [codes, np.ones_like(codes)] if minima else [codes]
    design = []  # one column an unknown: what it adds to L E R
    for basis in kinds:
        for row in range(rows):
            for group in range(3):
                only = np.zeros_like(basis)
                only[row, group * size : (group + 1) * size] = basis[row, group * size : (group + 1) * size]
                design.append((left @ only @ right).ravel())
    wanted = np.linalg.lstsq(np.array(design).T, (left @ weight @ right).ravel(), rcond=None)[0]
    start = np.full((len(kinds), rows, 3), 0.1)
    found = refit_scales(
        torch.from_numpy(weight), [torch.from_numpy(each) for each in kinds], torch.from_numpy(hessian),
        torch.from_numpy(moment) if guided else None, torch.from_numpy(start), size,
    ).numpy()  # fmt: skip

    def error(values):
        return np.square(np.array(design).T @ values.ravel() - (left @ weight @ right).ravel()).sum()

    return error(found) - error(wanted), error(start) - error(wanted)


def test_the_wanted_weight_is_the_damped_least_squares_of_all_tokens(random_generator):
    tokens, columns, rows = 60, 12, 7
    before = random_generator.standard_normal((tokens, columns))
    after = before + 0.3 * random_generator.standard_normal((tokens, columns))
    drift = random_generator.standard_normal((tokens, rows))
    weight = random_generator.standard_normal((rows, columns))
    pair = Pair(nn.Linear(columns, rows), "cpu", beside=True, drifts=True)
    half = tokens // 3
    for part in (slice(0, half), slice(half, tokens)):
        for task in pair.pair_tasks(*(torch.from_numpy(values[part]) for values in (after, before, drift))):
            task()
    pair.close()
    settings = GptaqSettings(weights="int4-g32", pull=0.7, drift=0.4, damping=0.05)
    strength = np.sqrt(0.05 * np.square(after).sum(0).mean())
    wanted_outputs = (0.7 * before + 0.3 * after) @ weight.T + 0.4 * drift
    wanted = np.linalg.lstsq(
        np.vstack([after, strength * np.eye(columns)]), np.vstack([wanted_outputs, strength * weight.T]), rcond=None
    )[0].T
    start = torch.from_numpy(weight.astype(np.float32))
    missing = missing_outputs(start, pair, settings.pull, settings.drift)
    found = (start + find_feedback(pair.matrix, settings).solve(missing)).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def captured_inputs(model, windows, runs=None):
    """Module path -> its inputs (tokens, in) in a whole forward pass; and what enters each layer's halves."""
    decoder, seen = Decoder.from_model(model), {}
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Linear) or path.endswith(("attention_norm", "ffn_norm")):
            rounded = runs is not None and runs.get(f"{path}.weight") is not None and isinstance(module, nn.Linear)
            if rounded and runs[f"{path}.weight"].activation == "int8-g32":
                module.register_forward_pre_hook(lambda _, args: (round_activations(args[0]),))
            module.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0].flatten(0, 1)))
    with torch.no_grad():
        decoder(torch.from_numpy(windows.astype(np.int64)))
    return seen


@pytest.mark.parametrize("threads", [1, 3])
def test_pairs_are_those_of_both_models_as_they_stand(threads, tiny_model, windows, monkeypatch):
    """Every stage sees the stages before it as replaced, in its own layer too."""
    monkeypatch.setattr("trilemma.techniques.products.has_fast_bf16", lambda device: False)
    model = tiny_model(seed=3)
    formats = {name: FORMATS.get("int4-g32") for name in model.config.linear_names()}
    runs = assign_runs(model.config, formats, "int8-g32")
    shown = windows(model, 7, 20)
    unchanged, made, checked = captured_inputs(model, shown), model, []

    def replace(pairs):
        nonlocal made
        now = captured_inputs(made, shown, runs)
        for name, pair in pairs.items():
            x, before = now[name.removesuffix(".weight")], unchanged[name.removesuffix(".weight")]
            layer, role = name.split(".")[1], name.split(".")[-2]
            np.testing.assert_allclose(pair.matrix.numpy(), (x.T @ x).numpy(), rtol=2e-3, atol=2e-2)
            np.testing.assert_allclose(pair.cross.numpy(), (before.T @ x).numpy(), rtol=2e-3, atol=2e-2)
            entering = {"o": "attention_norm", "down": "ffn_norm"}.get(role)
            assert (pair.drift is None) == (entering is None)
            if pair.drift is not None:
                stream = unchanged[f"layers.{layer}.{entering}"] - now[f"layers.{layer}.{entering}"]
                np.testing.assert_allclose(pair.drift.numpy(), (stream.T @ x).numpy(), rtol=2e-3, atol=2e-2)
            checked.append(name)
        new = {name: model.tensor(name) * np.float32(0.8) for name in pairs}
        made = made.with_tensors(new)
        return new

    calibrate_beside(model, model, Build(calibration=shown, threads=threads), runs, replace)
    assert sorted(checked) == sorted(model.config.linear_names())


def test_moments_are_those_of_gradients_through_the_whole_model(tiny_model, windows):
    model = tiny_model(seed=1)
    shown = windows(model, 3, 16)
    decoder, outputs = Decoder.from_model(model), {}
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, out, path=path: outputs.__setitem__(f"{path}.weight", out))
    wanted = dict.fromkeys(model.config.linear_names(), 0.0)
    for number, window in enumerate(torch.from_numpy(shown.astype(np.int64))):
        log_probs = decoder(window[None])[0].log_softmax(-1)
        generator = torch.Generator().manual_seed(5 * 1_000_003 + number)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)[:, 0]
        score = log_probs[torch.arange(len(drawn)), drawn].sum()
        for name, gradient in zip(wanted, torch.autograd.grad(score, [outputs[name] for name in wanted]), strict=True):
            wanted[name] = wanted[name] + gradient[0].T @ gradient[0] / shown.size
    found = guide_outputs(model, Build(calibration=shown, seed=5, threads=2), 1000).moments
    apart = guide_outputs(model, Build(calibration=shown, seed=5, threads=1), 20).moments
    assert set(found) == set(wanted)
    for name, moment in wanted.items():
        np.testing.assert_allclose(found[name][0].numpy(), moment.numpy(), rtol=1e-3, atol=1e-3 * float(moment.max()))
        size = apart[name].shape[1]
        assert size <= 20
        for at, block in enumerate(apart[name]):
            own = moment[at * size : (at + 1) * size, at * size : (at + 1) * size]
            np.testing.assert_allclose(block[: len(own), : len(own)], own, rtol=1e-3, atol=1e-3 * float(moment.max()))


@pytest.mark.parametrize("minima", ["", "-asym"])
@pytest.mark.parametrize("rows", [1000, 20])
def test_a_matrix_of_several_blocks_of_rows(rows, minima, random_generator):
    spec = FORMATS.get(f"int4-g32{minima}")
    weight = random_generator.standard_normal((50, 70)).astype(np.float32)
    hessian, moment = second_moment(random_generator, 70), second_moment(random_generator, 50)
    size = -(-50 // -(-50 // rows))
    blocks, within = np.zeros((-(-50 // size), size, size)), np.zeros((50, 50))
    for at in range(len(blocks)):
        part = slice(at * size, min(50, (at + 1) * size))
        own = moment[part, part]
        blocks[at, : len(own), : len(own)] = own
        within[part, part] = damped(own, 0.01)
    args = torch.from_numpy(hessian.astype(np.float32)), torch.from_numpy(blocks.astype(np.float32)), spec
    first, last = (
        weighed_error(
            quantize_gptaq(weight, None, *args, GptaqSettings(weights=spec.name, refits=refits)).dequantize() - weight,
            damped(hessian, 0.01), within,
        )
        for refits in (0, 3)
    )  # fmt: skip
    assert last < first


@pytest.mark.parametrize("name", ["int4-g32-k", "int5-g32-k", "int6-g16-k"])
def test_scales_of_two_levels_are_fitted_too(name, random_generator):
    spec = FORMATS.get(name)
    weight = random_generator.standard_normal((9, 512)).astype(np.float32)
    hessian, moment = second_moment(random_generator, 512), second_moment(random_generator, 9)
    args = torch.from_numpy(hessian.astype(np.float32)), torch.from_numpy(moment.astype(np.float32))[None], spec
    made = [quantize_gptaq(weight, None, *args, GptaqSettings(weights=name, refits=refits)) for refits in (0, 2)]
    errors = [
        weighed_error(each.dequantize() - weight, damped(hessian, 0.01), damped(moment, 0.01)) for each in made
    ]  # fmt: skip
    assert errors[1] < errors[0]
    np.testing.assert_array_equal(unpack(pack(made[1])).dequantize(), made[1].dequantize())


def answers_apart(model, made, tokens) -> float:
    with torch.no_grad():
        p, q = (Decoder.from_model(each)(tokens).log_softmax(-1) for each in (model, made))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["int4-g32-k", "int6-g16-k"])
def test_scales_of_two_levels_stay_on_their_grid(name, guided, random_generator):
    spec = FORMATS.get(name)
    weight = random_generator.standard_normal((32, 256)).astype(np.float32)
    hessian, moment = second_moment(random_generator, 256), second_moment(random_generator, 32)
    found = quantize_gptaq(
        weight, None, torch.from_numpy(hessian.astype(np.float32)),
        torch.from_numpy(moment)[None] if guided else None, spec, GptaqSettings(weights=name),
    )  # fmt: skip
    rounded = quantize_rtn(weight, spec, scale="mse", importance=np.diag(hessian).astype(np.float32))
    np.testing.assert_array_equal(found.sub_scales, rounded.sub_scales)
    weigh = moment if guided else np.eye(32)
    errors = [weighed_error(each.dequantize() - weight, hessian, weigh) for each in (found, rounded)]
    assert errors[0] < 0.8 * errors[1]


def test_answers_come_closer_to_the_unchanged_model(tiny_model, windows):
    """KL over several models: gptq, then pulled to the unchanged model, then guided by gradients too."""
    kinds = {"gptq": {}, "gptaq": {}, "guided": {"guided": True}}
    apart = dict.fromkeys(kinds, 0.0)
    for seed in range(3):
        model = tiny_model(seed=seed, dim=64, ffn=96)
        shown, tokens = windows(model, 32, 48), torch.from_numpy(windows(model, 12, 48).astype(np.int64))
        for kind, more in kinds.items():
            settings = {"weights": "int4-g32", "embedding": "bf16", **more}
            recipe = Recipe(name="x", steps=(Step(technique="gptq" if kind == "gptq" else "gptaq", settings=settings),))
            apart[kind] += answers_apart(model, apply_recipe(model, recipe, Build(calibration=shown)), tokens)
    assert apart["gptaq"] < 0.95 * apart["gptq"]
    assert apart["guided"] < 0.92 * apart["gptq"]


def test_experts_and_parallel_layers(random_model, experts_config, tiny_model, windows):
    parallel = tiny_model().config
    layers = tuple(layer.model_copy(update={"parallel": True}) for layer in parallel.layers)
    for config in (experts_config(), parallel.model_copy(update={"layers": layers})):
        model = random_model(config, 2)
        recipe = Recipe(name="x", steps=(Step(technique="gptaq", settings={"weights": "int4-g32", "guided": True}),))
        made = apply_recipe(model, recipe, Build(calibration=windows(model, 6, 24), threads=2))
        tokens = torch.from_numpy(windows(model, 2, 24).astype(np.int64))
        assert 0 < answers_apart(model, made, tokens) < 1


def test_the_same_seed_and_threads_give_the_same_bytes(tiny_model, windows):
    model = tiny_model(seed=5)
    shown = windows(model, 6, 24)
    recipe = Recipe(name="x", steps=(Step(technique="gptaq", settings={"weights": "int4-g32", "guided": True}),))
    made = [apply_recipe(model, recipe, Build(calibration=shown, threads=2)) for _ in range(2)]
    for name in model.config.linear_names():
        first, second = (unpack(each.stored(name)) for each in made)
        np.testing.assert_array_equal(first.codes, second.codes)
        np.testing.assert_array_equal(first.scales, second.scales)

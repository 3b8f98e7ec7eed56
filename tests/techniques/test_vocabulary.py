"""Embedding and head: codes of rows with Hessians of their own, and what these are made of, against dense oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.artifact import load_any
from trilemma.formats.quantize import fit_grid
from trilemma.model.decoder import Decoder
from trilemma.model.tokenizer import Tokenizer
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.output_guide import guide_outputs
from trilemma.techniques.quantize import gptaq
from trilemma.techniques.quantize.gptq import Feedback, gptq_codes


def second_moment(rng: np.random.Generator, size: int) -> np.ndarray:
    rows = rng.standard_normal((4 * size, size)) @ rng.standard_normal((size, size)) / np.sqrt(size)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "nl4-g32"])
def test_codes_of_rows_with_a_direction_each_are_those_of_their_own_hessians(name, order, random_generator):
    """Optimal brain quantization of each row by H + m m^T, inverted anew for every column."""
    spec, rows, columns = FORMATS.get(name), 9, 40
    weight = random_generator.standard_normal((rows, columns)).astype(np.float32)
    directions = 2 * random_generator.standard_normal((rows, columns))
    hessian = second_moment(random_generator, columns)
    scales, minima = fit_grid(weight, spec, scale="mse")
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(columns)
    taken = np.argsort(-np.diag(hessian), kind="stable") if order else np.arange(columns)
    wanted = np.zeros(weight.shape, np.int64)
    for row in range(rows):
        whole = damped + np.outer(directions[row], directions[row])
        work, remaining = weight[row].astype(np.float64), list(taken)
        while remaining:
            at, *remaining = remaining
            inverse = np.linalg.inv(whole[np.ix_([at, *remaining], [at, *remaining])])
            scale = float(scales[row, at // 32])
            shift = 0.0 if minima is None else float(minima[row, at // 32])
            near = np.abs((work[at] - shift) / scale - spec.legal_codes.astype(np.float64)).argmin()
            wanted[row, at] = spec.legal_codes[near]
            error = work[at] - (wanted[row, at] * scale + shift)
            work[remaining] -= error * inverse[0, 1:] / inverse[0, 0]
    for block in (1, 7, 128):
        found = gptq_codes(
            torch.from_numpy(weight), Feedback.of(torch.from_numpy(hessian), activation_order=order),
            torch.from_numpy(scales.astype(np.float64)),
            None if minima is None else torch.from_numpy(minima.astype(np.float64)), spec, block=block,
            directions=torch.from_numpy(directions),
        ).numpy()  # fmt: skip
        assert (found == wanted).mean() > 0.98  # a value half-way between two codes may fall to either side


@pytest.mark.parametrize("tied", [True, False])
def test_what_an_error_of_a_row_costs_is_what_the_answers_move_by(tied, tiny_model, windows):
    model = tiny_model(seed=2, tied=tied)
    shown = windows(model, 5, 24)
    decoder = Decoder.from_model(model)
    spread = np.zeros((model.config.vocab_size, model.config.dim, model.config.dim))
    chances, entering = np.zeros(model.config.vocab_size), np.zeros((model.config.dim, model.config.dim))
    for number, window in enumerate(torch.from_numpy(shown.astype(np.int64))):
        start = decoder.embed(window[None], torch.arange(24)).detach().requires_grad_()
        x = start
        for layer in decoder.layers:
            x = layer(x, torch.arange(24))
        log_probs = decoder.logits(x)[0].log_softmax(-1)
        p, h = log_probs.detach().exp(), decoder.final_norm(x)[0].detach().double()
        weight = (p * (1 - p)).double()
        spread += torch.einsum("tv,ti,tj->vij", weight, h, h).numpy()
        chances += weight.sum(0).numpy()
        drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(5 * 1_000_003 + number))[:, 0]
        (gradient,) = torch.autograd.grad(log_probs[torch.arange(24), drawn].sum(), [start])
        entering += (gradient[0].T @ gradient[0]).double().numpy()
    guide = guide_outputs(model, Build(calibration=shown, seed=5, threads=2), 100).vocabulary
    hessian, directions = guide.tied() if tied else guide.head()
    found = hessian.double()[None] + torch.einsum("vi,vj->vij", directions, directions).double()
    means = torch.from_numpy(np.stack([each / weight for each, weight in zip(spread, chances, strict=True)]))
    lookups = entering / chances.sum() if tied else 0
    # By rows in the mean, weighed by how likely they are, and each row's own direction.
    mean = (found * torch.from_numpy(chances)[:, None, None]).sum(0).numpy() / chances.sum()
    np.testing.assert_allclose(mean, spread.sum(0) / chances.sum() + lookups, rtol=2e-3, atol=2e-3 * np.abs(mean).max())
    np.testing.assert_allclose(guide.weights.numpy(), chances, rtol=1e-3)
    np.testing.assert_allclose(guide.embedding().numpy(), entering / shown.size, rtol=2e-3, atol=1e-3 * entering.max())
    shared = torch.from_numpy(spread.sum(0) / chances.sum())
    apart = [
        float(torch.linalg.matrix_norm(each - (means + torch.as_tensor(lookups))).mean())
        for each in (found, (shared + torch.as_tensor(lookups)).expand_as(found))
    ]
    assert apart[0] < apart[1]  # nearer to the rows' own than what they have in common


def test_a_guided_vocabulary_loses_less_than_a_rounded_one(hearth_path, texts_path):
    """4 bits of the shipped model's tied embedding alone, on other documents."""
    model, tokenizer = load_any(hearth_path), Tokenizer.load(hearth_path)
    text = tokenizer.encode(texts_path.read_text("utf-8")[:30_000])
    shown, other = np.array(text[: 2 * 16 * 64], dtype=np.int32).reshape(2, 16, 64)
    settings = {"weights": "f32", "embedding": "int4-g32", "activations": "f32"}

    def lost(technique, more):
        recipe = Recipe(name="ends", seed=0, steps=(Step(technique=technique, settings=settings | more),))
        made = apply_recipe(model, recipe, Build(calibration=shown, threads=1))
        with torch.no_grad():
            tokens = torch.from_numpy(other.astype(np.int64))
            wanted, found = (Decoder.from_model(each)(tokens).log_softmax(-1) for each in (model, made))
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    assert lost("gptaq", {"guided": True}) < 0.6 * lost("rtn", {})


def test_recipes_that_share_a_guide_make_the_same_bytes_as_alone(tiny_model, windows, monkeypatch):
    model, kept, made = tiny_model(seed=4), {}, []
    shown = windows(model, 4, 16)
    monkeypatch.setattr(gptaq, "guide_outputs", lambda *args: made.append(args[0]) or guide_outputs(*args))
    for level in ("int4-g32", "int8-g32"):
        settings = {"weights": level, "guided": True}
        recipe = Recipe(name=level, seed=0, steps=(Step(technique="gptaq", settings=settings),))
        shared, alone = (
            apply_recipe(model, recipe, Build(shown, threads=1, kept=each)) for each in (kept, None)
        )  # fmt: skip
        assert all(np.array_equal(shared.tensor(name), alone.tensor(name)) for name in model.config.linear_names())
    assert len(made) == 3  # once for both that share, and once for each alone
    other = tiny_model(seed=5)
    apply_recipe(other, recipe, Build(shown, threads=1, kept=kept))
    assert made[-1] is other  # never another model's

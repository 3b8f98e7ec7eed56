"""Single weights that become zero: brute force for the choice, exact solutions for the update."""

from __future__ import annotations

import itertools

import pytest
import torch

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe
from trilemma.formats.artifact import read_artifact, weights_bytes, write_artifact
from trilemma.model.decoder import layer_from_model
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.calibration import Gram
from trilemma.techniques.prune.masks import (
    Pattern,
    lowest_of_all,
    lowest_of_groups,
    lowest_per_row,
    remaining_weights,
)
from trilemma.techniques.prune.unstructured import Wanda, wanda_scores
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import read_settings


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.9])
def test_each_row_loses_its_lowest(random_generator, share):
    scores = torch.from_numpy(random_generator.standard_normal((7, 23)))
    mask = lowest_per_row(scores, share)
    count = int(share * 23)
    assert mask.sum(1).tolist() == [count] * 7
    for row, gone in zip(scores, mask, strict=True):
        assert sorted(row[gone].tolist()) == sorted(row.tolist())[:count]


def test_a_whole_matrix_loses_its_lowest(random_generator):
    scores = torch.from_numpy(random_generator.standard_normal((6, 11)))
    mask = lowest_of_all(scores, 0.5)
    assert mask.sum() == 33
    assert scores[mask].max() < scores[~mask].min()


@pytest.mark.parametrize(("text", "columns"), [("2:4", 24), ("4:8", 19), ("1:3", 10)])
def test_every_group_loses_its_lowest_and_an_incomplete_one_none(random_generator, text, columns):
    pattern = Pattern.read(text)
    scores = torch.from_numpy(random_generator.standard_normal((5, columns)))
    mask = lowest_of_groups(scores, pattern)
    whole = columns // pattern.of * pattern.of
    for row, first in itertools.product(range(5), range(0, whole, pattern.of)):
        group = scores[row, first : first + pattern.of]
        gone = mask[row, first : first + pattern.of]
        assert sorted(group[gone].tolist()) == sorted(group.tolist())[: pattern.zeros]
    assert not mask[:, whole:].any()


@pytest.mark.parametrize("text", ["", "2", "4:2", "0:4", "2:2", "-1:4", "2:4:8", "a:b", "2:4096"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="zeros:group"):
        Pattern.read(text)
    with pytest.raises(RecipeError, match="zeros:group"):
        read_settings(Wanda(), {"pattern": text})


def test_wanda_removes_what_changes_each_output_least(random_generator):
    """|w| ||x|| is the norm of the change that removing one weight alone makes: measured here by doing it."""
    x = torch.from_numpy(random_generator.standard_normal((40, 9)) * random_generator.uniform(0.1, 5, 9)).float()
    weight = torch.from_numpy(random_generator.standard_normal((3, 9))).float()
    gram = Gram(9)
    gram.update(x[:13])
    gram.update(x[13:])
    scores = wanda_scores(weight, gram)
    for row, column in itertools.product(range(3), range(9)):
        changed = weight.clone()
        changed[row, column] = 0
        torch.testing.assert_close(scores[row, column], (x @ (changed - weight).T).norm(), rtol=1e-4, atol=1e-5)


def test_the_last_zeros_update_is_the_exact_least_squares_one(random_generator):
    """With the removed columns in front and all else behind them, the update is the best possible one."""
    x = torch.from_numpy(random_generator.standard_normal((200, 12)))
    x = x + x @ torch.from_numpy(random_generator.standard_normal((12, 12))) * 0.5
    weight = torch.from_numpy(random_generator.standard_normal((4, 12)))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, :3] = True
    kept = remaining_weights(weight, 2 * x.T @ x, mask, damping=1e-9)
    assert not kept[:, :3].any()
    best = torch.linalg.lstsq(x[:, 3:], x @ weight.T).solution.T
    torch.testing.assert_close(kept[:, 3:], best, rtol=1e-5, atol=1e-6)


def test_the_update_makes_the_error_less(random_generator):
    ratios = []
    for _ in range(8):
        few = torch.from_numpy(random_generator.standard_normal((300, 8)))  # inputs that say much about each other
        x = few @ torch.from_numpy(random_generator.standard_normal((8, 30)))
        x += 0.3 * torch.from_numpy(random_generator.standard_normal(x.shape))
        weight = torch.from_numpy(random_generator.standard_normal((40, 30)))
        mask = lowest_per_row(weight.abs() * x.norm(dim=0), 0.5)
        plain, updated = weight.masked_fill(mask, 0), remaining_weights(weight, 2 * x.T @ x, mask)
        assert not updated[mask].any()
        ratios.append(float((x @ (updated - weight).T).norm() / (x @ (plain - weight).T).norm()))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.85


def test_wanda_calibrates_on_pruned_predecessors(tiny_model, random_generator, windows):
    """The second layer's choice is brute-forced from the inputs that the pruned first layer gives it."""
    model = tiny_model(seed=int(random_generator.integers(1000)))
    tokens = windows(model)
    made = apply_recipe(model, scheme_to_recipe("wanda50"), Build(calibration=tokens, threads=1))
    with torch.no_grad():
        hidden = torch.from_numpy(made.tensor("embedding.weight")[tokens])
        hidden = layer_from_model(made, 0)(hidden)
        layer = layer_from_model(model, 1)  # nothing of it is pruned yet
        inputs = layer.attention_norm(hidden).reshape(-1, model.config.dim)
    weight = torch.from_numpy(model.tensor("layers.1.attention.k.weight"))
    mask = lowest_per_row(weight.abs() * inputs.norm(dim=0), 0.5)
    found = torch.from_numpy(made.tensor("layers.1.attention.k.weight")) == 0
    assert (found != mask).float().mean() < 0.005  # ties of rounding aside
    assert found.sum() == mask.sum()


@pytest.mark.parametrize("scheme", ["magnitude30", "wanda30", "sparsegpt30", "magnitude2:4", "wanda4:8"])
def test_so_many_zeros_and_not_a_byte_less(tiny_model, random_generator, tmp_path, scheme, windows):
    model = tiny_model(seed=int(random_generator.integers(1000)))
    build = Build(calibration=windows(model), threads=1)
    made = apply_recipe(model, scheme_to_recipe(scheme), build)
    share = 0.5 if ":" in scheme else 0.3
    for name in model.config.linear_names():
        zeros = float((made.tensor(name) == 0).mean())
        assert share - 0.03 < zeros <= share, name
    write_artifact(made, tmp_path / "a", Recipe())
    assert weights_bytes(read_artifact(tmp_path / "a")) == weights_bytes(model)


@pytest.mark.parametrize("scheme", ["wanda50", "prune25", "kvheads1", "magnitude50"])
def test_quantized_weights_are_refused_with_the_right_order(tiny_model, scheme, windows):
    model = tiny_model()
    build = Build(calibration=windows(model))
    quantized = apply_recipe(model, scheme_to_recipe("W8A8"), build)
    with pytest.raises(RecipeError, match=r"quantize afterwards: \w+\+W"):
        apply_recipe(quantized, scheme_to_recipe(scheme), build)

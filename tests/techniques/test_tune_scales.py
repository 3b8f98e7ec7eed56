"""Scale tuning: the matrix as its format says, gradients of the textbook, every code and byte as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.artifact import weights_bytes
from trilemma.formats.grid import QuantizedMatrix
from trilemma.formats.pack import PackedMatrix, unpack
from trilemma.model.decoder import Decoder
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.distill.grids import OnGrid, put_on_grids
from trilemma.techniques.distill.objective import DistillationLoss
from trilemma.techniques.distill.rounding import round_straight_through
from trilemma.techniques.distill.teacher import TorchTeacher
from trilemma.techniques.schemes import scheme_to_recipe

GRIDS = ["int4-g32", "int4-g64-asym", "int5-g32-asym", "int8-channel", "int8-g128", "int4-g32-k", "int6-g16-k"]


def any_matrix(name: str, shape: tuple[int, int], rng: np.random.Generator) -> QuantizedMatrix:
    """Random codes, scales and minima."""
    spec, (rows, columns) = FORMATS.get(name), shape
    low, high = spec.code_range

    def f16(count: int) -> np.ndarray:
        return rng.normal(0, 0.02, (rows, count)).astype(np.float16)

    def factors() -> np.ndarray | None:
        return rng.integers(1, 30, (rows, spec.groups(columns))).astype(np.int8) if spec.supergroup else None

    return QuantizedMatrix(
        spec, rng.integers(low, high + 1, shape).astype(np.int8), f16(spec.f16_groups(columns)),
        None if spec.symmetric else f16(spec.f16_groups(columns)),
        factors(), None if spec.symmetric else factors(),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 70), (3, 512), (5, 300)])
@pytest.mark.parametrize("name", GRIDS)
def test_it_begins_as_the_matrix_that_it_was_and_ends_as_the_one_that_is_stored(name, shape, random_generator):
    matrix = any_matrix(name, shape, random_generator)
    grid = OnGrid(matrix)
    nothing = grid.right_inverse(torch.zeros(shape))
    np.testing.assert_array_equal(grid(*nothing).numpy(), matrix.dequantize())
    learned = [torch.from_numpy(random_generator.normal(0, 0.05, part.shape)).float() for part in nothing]
    stored = grid.learned(*learned)
    np.testing.assert_array_equal(grid(*learned).numpy(), stored.dequantize())
    np.testing.assert_array_equal(stored.codes, matrix.codes)
    assert not np.array_equal(stored.scales, matrix.scales)
    assert stored.sub_scales is matrix.sub_scales


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_those_of_a_sum_over_the_group(name, random_generator):
    matrix = any_matrix(name, (4, 300), random_generator)
    spec, toward = matrix.spec, random_generator.standard_normal((4, 300))
    grid = OnGrid(matrix)
    learned = [part.requires_grad_() for part in grid.right_inverse(torch.zeros(4, 300))]
    (grid(*learned) * torch.from_numpy(toward).float()).sum().backward()
    for which, values in enumerate((matrix.scales, matrix.minima)):
        if values is None:
            continue
        factors = (matrix.sub_scales, matrix.sub_minima)[which]
        wanted = np.zeros(values.shape)
        for row in range(4):
            for column in range(300):
                group = column // spec.group_size(300)
                at = group if spec.supergroup is None else column // spec.supergroup
                part = toward[row, column] * (1 if factors is None else float(factors[row, group]))
                if which == 0:
                    wanted[row, at] += part * matrix.codes[row, column] * float(values[row, at])
                elif factors is None:
                    wanted[row, at] += part * abs(float(matrix.scales[row, at])) * sum(map(abs, spec.code_range)) / 2
                else:
                    wanted[row, at] += part * float(values[row, at])
        np.testing.assert_allclose(learned[which].grad.numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def kl(model, original, tokens) -> float:
    decoder = Decoder.from_model(model).requires_grad_(False)
    round_straight_through(decoder, model)
    batch = (torch.arange(len(tokens)), torch.from_numpy(tokens.astype(np.int64)))
    return float(DistillationLoss(TorchTeacher(Decoder.from_model(original)))(decoder, batch))


@pytest.mark.parametrize(("scheme", "tied"), [("W4A8-g32", True), ("W4A16-g32-asym-e4", False)])
def test_it_comes_nearer_than_norms_alone_and_keeps_every_code(tiny_model, tokens, scheme, tied):
    original = tiny_model(seed=int(tokens[0, 1]), tied=tied)
    packed = apply_recipe(original, scheme_to_recipe(scheme), Build())
    build = Build(calibration=tokens, original=original, threads=1)

    def tuned(technique: str, **settings: object):
        step = Step(technique=technique, settings={"steps": 60, "batch_size": 4, **settings})
        return apply_recipe(packed, Recipe(steps=(step,)), build)

    made = tuned("tune-scales", learning_rate=3e-3)
    assert kl(made, original, tokens) < 0.8 * kl(packed, original, tokens)
    assert kl(made, original, tokens) < kl(tuned("tune-norms"), original, tokens)
    assert weights_bytes(made) == weights_bytes(packed)
    for name, shape in original.config.tensor_shapes().items():
        if len(shape) == 2:
            before, after = packed.stored(name), made.stored(name)
            assert isinstance(before, PackedMatrix)
            assert isinstance(after, PackedMatrix)
            np.testing.assert_array_equal(unpack(after).codes, unpack(before).codes)
            assert made.linear(name) == packed.linear(name)


def test_embedding_and_norms_can_be_left_alone(tiny_model, tokens):
    original = tiny_model(seed=4)
    packed = apply_recipe(original, scheme_to_recipe("W4A8-g32"), Build())
    step = Step(technique="tune-scales", settings={"steps": 2, "norms": False, "embedding": False})
    made = apply_recipe(packed, Recipe(steps=(step,)), Build(calibration=tokens, original=original, threads=1))
    changed = {name for name in original if not np.array_equal(made.tensor(name), packed.tensor(name))}
    assert changed == set(original.config.linear_names())
    plain = Recipe(steps=(step,))
    with pytest.raises(RecipeError, match="Quantize first"):
        apply_recipe(original, plain, Build(calibration=tokens, threads=1))


def test_a_tied_embedding_is_one_grid(tiny_model):
    packed = apply_recipe(tiny_model(tied=True), scheme_to_recipe("W4A8-g32-e4"), Build())
    decoder = Decoder.from_model(packed)
    grids = put_on_grids(decoder, packed)
    assert "embedding.weight" in grids
    assert isinstance(decoder.embedding, nn.Embedding)
    np.testing.assert_array_equal(decoder.embedding.weight.detach().numpy(), packed.tensor("embedding.weight"))

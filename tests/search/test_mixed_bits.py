"""Bits of each tensor on a tiny checkpoint: what is chosen fits and is what the recipe makes, the same bytes again."""

import itertools

import numpy as np
import pytest
from typer.testing import CliRunner

import trilemma
from pretend_device import install
from trilemma.cli.main import app
from trilemma.core.errors import DataError, InputError, LimitError, RecipeError
from trilemma.formats.artifact import load_any, read_artifact
from trilemma.formats.pack import format_bytes
from trilemma.search import mixed_bits, tensor_kit
from trilemma.search.levels import choose
from trilemma.search.mixed_bits import mix_bits, split_around
from trilemma.search.tensor_kit import Kit, measure_table, recipe_of
from trilemma.search.texts import read_texts
from trilemma.techniques import apply
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build

PRETEND = install()  # before anything went backward: autograd counts devices once
LEVELS = ("int4-g32", "int5-g32", "int8-g32")


def uniform(model, level):
    return apply_recipe(model, recipe_of({}, "rtn", level, 0, weights=level), Build())


@pytest.fixture(scope="module")
def mixed(tiny_checkpoint, tiny_text, tmp_path_factory):
    model = load_any(tiny_checkpoint.path)
    texts = read_texts([tiny_text], tiny_checkpoint.tokenizer, 96, 0, "none")
    found = mix_bits(
        model, texts, 6.5, folder=tmp_path_factory.mktemp("work"), key="tiny", levels=LEVELS, generations=2, tokens=400,
        threads=1,
    )  # fmt: skip
    return model, texts, found


def test_fits_its_bits_and_counts_them_right(mixed):
    model, _, found = mixed
    shapes = model.config.tensor_shapes()
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert set(found.formats) == set(matrices)
    taken = sum(8 * format_bytes(found.formats[name], shape) for name, shape in matrices.items())
    assert found.bits == pytest.approx(taken / sum(rows * columns for rows, columns in matrices.values()))
    assert 5.5 < found.bits <= 6.5
    assert len(set(found.formats.values())) > 1
    assert found.kl_mean <= found.exact_kl_mean


def test_the_recipe_gives_each_tensor_its_format(mixed):
    model, texts, found = mixed
    made = apply_recipe(model, found.recipe, Build(texts.calibration, threads=1))
    assert {name: made.format_of(name) for name in found.formats} == found.formats


def test_a_scheme_beside_bits_prepares_before_and_tunes_after(mixed, tmp_path):
    model, texts, _ = mixed
    steps = scheme_to_recipe("smooth+scales3").steps
    found = mix_bits(
        model, texts, 6.5, folder=tmp_path, key="tiny", levels=LEVELS, method="gptq", generations=0, tokens=200,
        around=steps, threads=1,
    )  # fmt: skip
    assert [step.technique for step in found.recipe.steps] == ["smooth", "gptq", "tune-scales"]
    assert split_around(steps) == (steps[:1], steps[1:])


def test_one_tensor_at_a_time_against_all_combinations(tiny_model):
    """The table by hand: each entry is the loss with that tensor alone in that format, and the choice is the best."""
    model = tiny_model(layers=1, vocab=61)
    kit_names = ("embedding.weight", "layers.0.ffn.up.weight", "layers.0.ffn.down.weight")
    kit = Kit(kit_names, LEVELS, tuple(uniform(model, level) for level in LEVELS))
    floor = kit.models[-1]

    def loss(candidate):
        return sum(float(np.square(candidate.tensor(name) - model.tensor(name)).sum()) for name in kit_names)

    table = measure_table(kit, loss, lambda tensor, name: len(tensor) * len(name) * 1e-9, lambda *_: None)
    for item, name in enumerate(kit_names):
        for level, format_name in enumerate(LEVELS):
            alone = kit.models[level].tensor(name) - model.tensor(name)
            best = floor.tensor(name) - model.tensor(name)
            expected = float(np.square(alone).sum() - np.square(best).sum())
            assert table.loss[item, level] == pytest.approx(expected, rel=1e-3, abs=1e-9)
            shape = model.config.tensor_shapes()[name]
            assert table.takes[item, level, 0] == format_bytes(format_name, shape)
            assert table.takes[item, level, 1] == pytest.approx(len(name) * len(format_name) * 1e-9)
    least, most = table.takes[:, :, 0].min(axis=1).sum(), table.takes[:, :, 0].max(axis=1).sum()
    limits = ((least + most) / 2, 1.0)
    chosen = choose(table, limits)
    losses = {
        levels: loss(kit.assemble(dict(enumerate(levels))))
        for levels in itertools.product(range(3), repeat=3)
        if table.fits(levels, limits)
    }
    assert losses[chosen] == pytest.approx(min(losses.values()), rel=1e-4)


def test_from_the_command_line(tiny_checkpoint, tiny_text, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "compress", str(tiny_checkpoint.path), "-o", str(out), "--bits", "6", "--formats", "int4-g32,int8-g32",
        "--method", "gptq", "--tpot-ms", "1000", "--data", str(tiny_text), "--threads", "1",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "bits a value (" in done.stdout
    assert "ms a token by its products' times" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing of the work stays
    again = trilemma.compress(
        tiny_checkpoint.path, tmp_path / "again", recipe=out / "recipe.yaml", data=tiny_text, threads=1
    )  # fmt: skip
    first, second = read_artifact(out), read_artifact(tmp_path / "again")
    assert all(np.array_equal(first.tensor(n), second.tensor(n)) for n in first.config.tensor_shapes())
    assert again.weights_bytes < 0.45 * again.original_weights_bytes  # 6 bits and f32 norms, from bf16


def test_all_of_it_is_built_on_the_device_that_was_asked_for(tiny_checkpoint, tiny_text, tmp_path, monkeypatch):
    used = []
    for room in (tensor_kit, mixed_bits, apply):

        def spy(model, recipe, build, real=room.apply_recipe):
            used.append(build.device)
            return real(model, recipe, build)

        monkeypatch.setattr(room, "apply_recipe", spy)
    arguments = [
        "compress", str(tiny_checkpoint.path), "-o", str(tmp_path / "out"), "--bits", "6", "--scheme", "smooth",
        "--formats", "int4-g32,int8-g32", "--data", str(tiny_text), "--threads", "1", "--device", PRETEND,
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert used == [PRETEND] * 4  # to prepare, a kit of two formats, and the artifact


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"bits": 2.0}, RecipeError, "the smallest formats take"),
        ({"bits": -1.0}, RecipeError, "can not take -1 bits"),
        ({"bits": 5.0, "data": None}, DataError, "--data"),
        ({"bits": 5.0, "scheme": "smooth+W4A8-g32"}, RecipeError, "quantizes by itself"),
        ({"bits": 5.0, "formats": ["int4-g32"]}, RecipeError, "two formats"),
        ({"bits": 5.0, "tpot_ms": 1e-5}, LimitError, "without any product it takes"),
        ({"scheme": "bf16", "tpot_ms": 0.0}, RecipeError, "belong to `bits`"),
        ({"bits": 5.0, "method": "best"}, RecipeError, "Methods: rtn"),
        ({"scheme": "bf16", "method": "gptq"}, RecipeError, "belong to `bits`"),
        ({"bits": 5.0, "formats": ["int4-g32", "int9"]}, InputError, "int9"),
        ({"scheme": "bf16", "formats": ["int4-g32"]}, RecipeError, "belong to `bits`"),
        ({"scheme": "W4A8-g32", "device": "cdua"}, InputError, "torch knows no device 'cdua'"),
        ({"bits": 5.0, "device": "xpu:7"}, InputError, "'xpu:7' can not be used: .* finds cpu"),
    ],
)
def test_refusals(tiny_checkpoint, tiny_text, tmp_path, given, error, words):
    with pytest.raises(error, match=words):
        trilemma.compress(tiny_checkpoint.path, tmp_path / "out", **{"data": tiny_text, "threads": 1} | given)
    assert not list(tmp_path.iterdir())

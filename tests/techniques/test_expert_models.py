"""Calibration and quantizers on experts: their statistics are those of the tokens that chose them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact, write_artifact
from trilemma.model.decoder import Decoder, layer_from_model
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.calibration import calibrate_layers, input_groups
from trilemma.techniques.quantize.rtn import round_matrix
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.technique import Build


@pytest.fixture
def model(experts_config, random_model, random_generator):
    return random_model(experts_config(shared_hidden=20, down_bias=True), int(random_generator.integers(2**31)))


def build(model, random_generator) -> Build:
    return Build(random_generator.integers(0, model.config.vocab_size, (9, 32)).astype(np.int32), threads=1)


def test_groups_are_a_partition(model):
    for index in range(2):
        groups = input_groups(model.config, index)
        flat = [name for group in groups for name in group]
        mine = [name for name in model.config.linear_names() if name.startswith(f"layers.{index}.")]
        assert sorted(flat) == sorted(mine)
        assert len(groups) == 2 + 2 + 2 * 5
    assert tuple(f"layers.1.ffn.{name}.weight" for name in ("router", "shared.gate", "shared.up")) in groups
    assert ("layers.1.ffn.experts.3.gate.weight", "layers.1.ffn.experts.3.up.weight") in groups


def test_statistics_are_those_of_the_routed_tokens(model, random_generator):
    found = {}
    given = build(model, random_generator)
    calibrate_layers(model, given, {}, lambda grams: found.update(grams) or {})
    decoder, layer = Decoder.from_model(model), layer_from_model(model, 0)
    with torch.no_grad():
        tokens = torch.from_numpy(given.calibration.astype(np.int64))
        x = decoder.embed(tokens, torch.arange(32))
        x = x + layer.attention(layer.attention_norm(x), torch.arange(32))
        flat = layer.ffn_norm(x).reshape(-1, model.config.dim)
        chosen, _ = layer.ffn.route(flat)
        for expert in range(5):
            rows = flat[(chosen == expert).any(-1)]
            gram = found[f"layers.0.ffn.experts.{expert}.up.weight"]
            assert gram.tokens == len(rows)
            torch.testing.assert_close(gram.matrix, rows.T @ rows, rtol=1e-3, atol=1e-2)
    assert found["layers.0.ffn.shared.gate.weight"].tokens == found["layers.0.ffn.router.weight"].tokens == 9 * 32
    assert sum(found[f"layers.1.ffn.experts.{e}.down.weight"].tokens for e in range(5)) == 2 * 9 * 32


@pytest.mark.parametrize("scheme", ["W8A8-g32", "W4A8-g32-gptq", "W4A16-g32"])
def test_quantized_experts_save_load_and_stay_close(scheme, model, random_generator, tmp_path):
    recipe = scheme_to_recipe(scheme)
    made = apply_recipe(model, recipe, build(model, random_generator))
    for index in range(2):
        assert made.format_of(f"layers.{index}.ffn.router.weight") == "bf16"
        assert made.linear(f"layers.{index}.ffn.router.weight").activation != "int8-g32"
        assert made.format_of(f"layers.{index}.ffn.experts.4.down.weight").startswith("int")
    write_artifact(made, tmp_path / "artifact", recipe)
    back = read_artifact(tmp_path / "artifact")
    for name in model:
        np.testing.assert_array_equal(back.tensor(name), made.tensor(name))
        error = np.linalg.norm(made.tensor(name) - model.tensor(name)) / np.linalg.norm(model.tensor(name))
        assert error < 0.25, name


def test_an_expert_that_nobody_chose_is_rounded_to_nearest(model, random_generator):
    router = model.tensor("layers.0.ffn.router.weight").copy()
    shut = np.zeros_like(router)
    shut[:2] = router[:2]  # scores of the others are 0: make the first two always larger
    model = model.with_tensors({
        "layers.0.ffn.router.weight": np.abs(shut),
        "layers.0.ffn_norm.weight": np.zeros(48, np.float32),  # all scores 0: ties go to experts 0 and 1
    })  # fmt: skip
    settings = {"weights": "int4-g32", "activations": "int8-g32"}
    recipe = Recipe(name="w4", seed=0, steps=(Step(technique="gptq", settings=settings),))
    made = apply_recipe(model, recipe, build(model, random_generator))
    name = "layers.0.ffn.experts.4.up.weight"
    from trilemma.formats import FORMATS

    expected = round_matrix(name, model.tensor(name), FORMATS.get("int4-g32"), "mse").dequantize()
    np.testing.assert_array_equal(made.tensor(name), expected)


def test_an_override_of_a_whole_layer_leaves_its_router(model):
    settings = {"weights": "bf16", "overrides": {"layers.0.*": "int8-g32"}}
    made = apply_recipe(model, Recipe(name="r", seed=0, steps=(Step(technique="rtn", settings=settings),)), Build())
    assert made.format_of("layers.0.ffn.router.weight") == "bf16"
    assert made.format_of("layers.0.ffn.experts.0.up.weight") == "int8-g32"


def test_learned_positions_are_calibrated_on_and_kept(tiny_model, random_model, random_generator):
    config = tiny_model().config.model_copy(update={"learned_positions": True, "embedding_scale": 3.0, "norm": "layer"})
    model = random_model(config, 3)
    given, found = build(model, random_generator), {}
    calibrate_layers(model, given, {}, lambda grams: found.update(grams) or {})
    decoder = Decoder.from_model(model)
    with torch.no_grad():
        x = decoder.embed(torch.from_numpy(given.calibration.astype(np.int64)), torch.arange(32))
        flat = decoder.layers[0].attention_norm(x).reshape(-1, config.dim)
    torch.testing.assert_close(found["layers.0.attention.k.weight"].matrix, flat.T @ flat, rtol=1e-3, atol=1e-2)
    made = apply_recipe(model, scheme_to_recipe("W4A8-g32"), Build())
    assert made.format_of("position.weight") == "bf16"
    assert "position.weight" not in made.linears

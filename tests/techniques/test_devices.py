"""Techniques on another device: the same result as on the CPU, nothing of it computed in both places at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretend_device import NAME, install
from trilemma.core.errors import InputError
from trilemma.core.recipe import Recipe, Step
from trilemma.techniques import TECHNIQUES, Build, products
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.quantize.gptq import Gptq
from trilemma.techniques.schemes import scheme_to_recipe
from trilemma.techniques.torch_device import check_device

install()  # before anything went backward: autograd counts devices once
SCHEMES = (
    "W4A8-g32", "W4A8-g32-hqq", "W4A8-g32-gptq", "W4A16-g32-gptq", "W3A8-g32-asym-gptq", "W4A8-g32-gptaq",
    "smooth+W8A8-g32", "rotate+W4A8-g32-gptq", "awq+W4A8-g32-gptq",
    "prune25+W4A8-g32-gptq", "layers25+bf16", "parts25+bf16", "magnitude50", "wanda50", "wanda2:4", "sparsegpt50",
    "kvheads1+bf16", "experts2x1", "W4A8-g32-gptq-kv8",
    "W3A8-g32-gptq+eora8",
)  # fmt: skip
TRAINED = ("W4A8-g32-gptq+tune3", "W4A8-g32-gptq+scales3", "heal3+f32")
BY_GRADIENTS = ("W4A8-g32-guided", "W4A8-g32-sign")
DISTILL = Recipe(steps=(Step(technique="distill", settings={"shrink": 0.3, "steps": 3, "keep_top": 9}),))


def both(recipe, model, tokens, monkeypatch):
    """(the same model from here, from there); products and attention in one way, whatever else the CPU has."""
    monkeypatch.setattr(products, "has_fast_bf16", lambda _: True)
    with sdpa_kernel(SDPBackend.MATH):
        made = [apply_recipe(model, recipe, Build(tokens, threads=1, device=device)) for device in ("cpu", NAME)]
    assert made[0].config == made[1].config
    names = made[0].config.tensor_shapes()
    return [{name: each.tensor(name) for name in names} for each in made]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_gives_the_same_bits_on_another_device(scheme, tiny_model, tokens, monkeypatch):
    here, there = both(scheme_to_recipe(scheme), tiny_model(seed=1, layers=4, ffn=176), tokens, monkeypatch)
    for name, values in here.items():
        np.testing.assert_array_equal(there[name], values, err_msg=name)


@pytest.mark.parametrize("scheme", [*TRAINED, "distill"])
def test_training_gives_the_same_but_for_rounding_on_another_device(scheme, tiny_model, tokens, monkeypatch):
    recipe = DISTILL if scheme == "distill" else scheme_to_recipe(scheme)
    here, there = both(recipe, tiny_model(seed=1, ffn=176), tokens, monkeypatch)
    for name, values in here.items():
        off = np.linalg.norm(there[name] - values)  # Adam's first steps take the sign of the least gradient
        assert off < 1e-3 * np.linalg.norm(values), name


@pytest.mark.parametrize("scheme", BY_GRADIENTS)
def test_gradients_lose_as_little_on_another_device(scheme, tiny_model, tokens, monkeypatch):
    """Their last bit differs; it is the sign of one near zero, and tells between codes that are nearly as good."""
    model = tiny_model(seed=1, ffn=176)
    here, there = both(scheme_to_recipe(scheme), model, tokens, monkeypatch)
    for name in model.config.linear_names():
        lost = [float(np.linalg.norm(each[name] - model.tensor(name))) for each in (here, there)]
        assert lost[1] == pytest.approx(lost[0], rel=0.1), name


def test_no_technique_is_left_out():
    recipes = [*(scheme_to_recipe(scheme) for scheme in (*SCHEMES, *TRAINED, *BY_GRADIENTS)), DISTILL]
    assert {step.technique for recipe in recipes for step in recipe.steps} == set(TECHNIQUES.names())


@pytest.mark.parametrize("name", ["cdua", "meta", "", "cuda:x"])
def test_device_that_is_none_is_refused(name):
    with pytest.raises(InputError, match=r"Give cpu, cuda or, of several GPUs, cuda:1"):
        check_device(name)


def test_device_that_is_not_here_is_refused():
    with pytest.raises(InputError, match=r"The device 'xpu:7' can not be used: .* finds cpu"):
        check_device("xpu:7")


def test_a_device_that_is_too_small_is_named(tiny_model, tokens, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. More words.")

    monkeypatch.setattr(Gptq, "apply", too_much)
    with pytest.raises(
        InputError, match=r"'pretend' has too little memory for the technique 'gptq': CUDA out of memory"
    ):
        apply_recipe(tiny_model(), scheme_to_recipe("W4A8-g32-gptq"), Build(tokens, device=NAME))


def test_cpu_is_a_device():
    assert check_device("cpu") == "cpu"

"""Which recipes are worth trying on a model: uniform ones, mixed ones, and more precise neighbours.

The order is that of promise, so that a short search sees the best first. Allocations tensor by tensor
come from `allocate.py` once sensitivities are measured.
"""

from __future__ import annotations

from trilemma.core.recipe import Recipe, Step
from trilemma.model.config import DecoderConfig
from trilemma.techniques.schemes import scheme_to_recipe

# Round-to-nearest first: they cost seconds, so that even a short search has something sound to show.
_SCHEMES = (
    "W8A8-g32",
    "W4A8-g32",
    "W4A8-g32-gptq",
    "mixed",
    "W8A8",
    "W4A8-g32-asym-gptq",
    "W4A8-g128-gptq",
    "W8A16",
    "W4A8-g32-gptq-e4",
    "W4A8-g64-gptq",
    "W4A16-g32-gptq",
    "W4A8-g32-gptq-kv8",
    "W8A8-g32-kv8",
    "W4A8-g64-asym-gptq",
    "W8A8-g128",
    "W4A8-g128-gptq-e4",
)


def candidates(config: DecoderConfig, *, seed: int = 0) -> list[Recipe]:
    """Recipes in the order in which they should be tried, each with a readable name."""
    found: list[Recipe] = []
    for scheme in _SCHEMES:
        if scheme == "mixed":
            found += _mixed(config, seed)
        else:
            found.append(scheme_to_recipe(scheme, seed=seed))
    return found


def four_bit_with(overrides: dict[str, str], name: str, *, seed: int, embedding: str = "int8-g32") -> Recipe:
    """4-bit GPTQ in groups of 32 with some tensors kept in other formats."""
    settings = {"weights": "int4-g32", "embedding": embedding, "overrides": overrides, "activations": "int8-g32"}
    return Recipe(name=name, seed=seed, steps=(Step(technique="gptq", settings=settings),))


def _mixed(config: DecoderConfig, seed: int) -> list[Recipe]:
    """What usually hurts most is kept in 8 bits: the way down, the values, the first and last layers."""
    roles = {name.split(".", 2)[2] for name in config.linear_names()}
    fragile = [role for role in ("ffn.down.weight", "attention.v.weight") if role in roles]
    recipes = []
    if fragile:
        overrides = {f"*.{role}": "int8-g32" for role in fragile}
        recipes.append(four_bit_with(overrides, "W4A8-g32-gptq+down,v8", seed=seed))
    layers = len(config.layers)
    if layers >= 4:
        ends = {"layers.0.*.weight": "int8-g32", f"layers.{layers - 1}.*.weight": "int8-g32"}
        recipes.append(four_bit_with(ends, "W4A8-g32-gptq+ends8", seed=seed))
    return recipes

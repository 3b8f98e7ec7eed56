"""Short names of recipes: `W4A8-g32-gptq` is read here and nowhere else.

W{4,8}A{8,16}  weights and activations; A8 rounds activations to int8 in groups of 32,
               A16 really computes with bf16 activations
-g{32,64,128}  weights that share a scale; 8-bit weights without it share one per row
-asym          4-bit weights with a minimum per group
-gptq          choose codes with calibration text; without it round to nearest
-e{4,8,16}     bits of the embedding (and tied head); by default 8
-kv{8,16,32}   precision of the KV cache; by default bf16
f32, bf16, f16 floating point throughout
"""

from __future__ import annotations

import re
from typing import Any

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS

_PATTERN = re.compile(
    r"W(?P<weights>\d+)A(?P<activations>\d+)(?:-g(?P<group>\d+))?(?P<asym>-asym)?(?P<gptq>-gptq)?(?P<rest>(?:-(?:e|kv)\d+)*)",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"(?P<dtype>f32|bf16|f16)(?P<rest>(?:-kv\d+)*)", re.IGNORECASE)
_SUFFIX = re.compile(r"-(e|kv)(\d+)", re.IGNORECASE)
_EMBEDDING = {"4": "int4-g32", "8": "int8-g32", "16": "bf16"}
_KV = {"8": "int8", "16": "bf16", "32": "f32"}
_ACTIVATIONS = {"8": "int8-g32", "16": "bf16"}

SCHEMES: dict[str, str] = {
    "f32": "unchanged values in f32: the reference",
    "bf16": "16-bit floating point throughout",
    "f16": "16-bit half precision weights",
    "W8A8": "8-bit weights, a scale per row",
    "W8A8-g32": "8-bit weights in groups of 32 (GGUF Q8_0): close to lossless",
    "W8A8-g128": "8-bit weights in groups of 128",
    "W8A16": "8-bit weights, 16-bit activations",
    "W4A8-g32": "4-bit weights in groups of 32 (GGUF Q4_0), rounded to nearest: needs no text",
    "W4A8-g32-gptq": "the same grid, codes chosen with calibration text",
    "W4A8-g32-asym-gptq": "4-bit weights with minima (GGUF Q4_1), codes chosen with calibration text",
    "W4A8-g64-gptq": "4-bit weights in groups of 64",
    "W4A8-g64-asym-gptq": "4-bit weights with minima in groups of 64",
    "W4A8-g128-gptq": "4-bit weights in groups of 128: the smallest",
    "W4A16-g32-gptq": "4-bit weights, 16-bit activations",
    "W4A16-g128-gptq": "4-bit weights in groups of 128, 16-bit activations",
    "W4A8-g32-gptq-e4": "4 bits for the embedding and head too",
    "W4A8-g32-gptq-kv8": "8-bit KV cache too",
    "W8A8-g32-kv8": "8 bits throughout",
}


def list_schemes() -> dict[str, str]:
    """Recommended schemes -> one line about each. Any combination that the module's text allows works."""
    return dict(SCHEMES)


def scheme_to_recipe(name: str, *, seed: int = 0) -> Recipe:
    """The recipe that a scheme's name stands for.

    Raises:
        RecipeError: it can not be read, or asks for a format that no table lists.
    """
    plain = _PLAIN.fullmatch(name)
    if plain:
        dtype = plain["dtype"].lower()
        steps = [Step(technique="plain", settings={"dtype": dtype}), *_kv_steps(name, plain["rest"])]
        return Recipe(name=name, seed=seed, steps=tuple(steps))
    match = _PATTERN.fullmatch(name)
    if not match:
        raise _unknown(name, "it can not be read")
    weights = _weights_format(name, match)
    settings: dict[str, Any] = {
        "weights": weights,
        "embedding": _embedding(name, match["rest"], weights),
        "activations": _pick(name, "activation bits", match["activations"], _ACTIVATIONS),
    }
    technique = "gptq" if match["gptq"] else "rtn"
    steps = [Step(technique=technique, settings=settings), *_kv_steps(name, match["rest"])]
    return Recipe(name=name, seed=seed, steps=tuple(steps))


def _weights_format(scheme: str, match: re.Match[str]) -> str:
    group = f"g{match['group']}" if match["group"] else "channel"
    wanted = f"int{match['weights']}-{group}{'-asym' if match['asym'] else ''}"
    if wanted not in FORMATS:
        valid = [name for name in FORMATS if name.startswith("int")]
        raise _unknown(scheme, f"it means the weight format '{wanted}', and the formats are {', '.join(valid)}")
    return wanted


def _embedding(scheme: str, rest: str, weights: str) -> str:
    bits = [value for kind, value in _SUFFIX.findall(rest) if kind.lower() == "e"]
    if not bits:
        return weights if FORMATS.get(weights).bits == 8 else "int8-g32"
    return _pick(scheme, "embedding bits", bits[-1], _EMBEDDING)


def _kv_steps(scheme: str, rest: str) -> list[Step]:
    bits = [value for kind, value in _SUFFIX.findall(rest) if kind.lower() == "kv"]
    if not bits:
        return []
    return [Step(technique="kv-cache", settings={"precision": _pick(scheme, "KV cache bits", bits[-1], _KV)})]


def _pick(scheme: str, what: str, value: str, table: dict[str, str]) -> str:
    if value not in table:
        raise _unknown(scheme, f"{what} must be {', '.join(table)}, not {value}")
    return table[value]


def _unknown(name: str, why: str) -> RecipeError:
    return RecipeError(
        f"Unknown scheme '{name}': {why}. A scheme looks like W8A8, W4A8-g32-gptq, W4A16-g128, "
        "W4A8-g64-asym-gptq-kv8 or bf16; `trilemma list schemes` shows those recommended."
    )

"""Which part gets which bits: sensitivities measured one part at a time, then solved exactly under bytes.

A part is the attention or the feed-forward matrices of one layer, or the embedding. Its sensitivity is
the KL of the model in which it alone is rounded to 4 bits. Above about four bits such errors add (HIGGS,
arXiv:2411.17525), so the multiple-choice knapsack of `solve.py` over them is the right problem; its
answer is a candidate like any other, and what it really loses is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS
from trilemma.formats.pack import format_bytes, pack
from trilemma.formats.quantize import quantize_rtn
from trilemma.model.config import DecoderConfig
from trilemma.model.model import LinearRun, Model
from trilemma.search.solve import Option, solve

LOW, HIGH = "int4-g32", "int8-g32"


@dataclass(frozen=True)
class Part:
    """Matrices that get one format. `pattern` finds them in a recipe's overrides."""

    pattern: str
    names: tuple[str, ...]


def parts_of(config: DecoderConfig) -> list[Part]:
    shapes = config.tensor_shapes()
    found = []
    for index in range(len(config.layers)):
        for block in ("attention", "ffn"):
            pattern = f"layers.{index}.{block}.*"
            names = tuple(n for n, s in shapes.items() if n.startswith(pattern[:-1]) and len(s) == 2)
            if names:
                found.append(Part(pattern, names))
    ends = [name for name in ("embedding.weight", "head.weight") if name in shapes]
    return [*found, *(Part(name, (name,)) for name in ends)]


def sensitivities(
    model: Model, parts: list[Part], kl_of: Callable[[Model], float], tell: Callable[[int, int], None]
) -> dict[str, float]:
    """Pattern -> KL of the model with that part alone in 4 bits, rounded to nearest."""
    found = {}
    for done, part in enumerate(parts):
        tensors = {name: pack(quantize_rtn(model.tensor(name), FORMATS.get(LOW), scale="mse")) for name in part.names}
        runs = {
            name: LinearRun(activation="int8-g32")
            for name in part.names
            if model.config.tied or name != "embedding.weight"
        }
        found[part.pattern] = max(0.0, kl_of(model.with_tensors(tensors, runs)))
        tell(done + 1, len(parts))
    return found


def allocation(
    config: DecoderConfig, parts: list[Part], kl: Mapping[str, float], most_bytes: float, *, seed: int
) -> Recipe | None:
    """4-bit GPTQ with the parts in 8 bits that help most within `most_bytes` of matrices; None when none fit."""
    shapes = config.tensor_shapes()

    def size(part: Part, form: str) -> float:
        return float(sum(format_bytes(form, (shapes[n][0], shapes[n][1])) for n in part.names))

    items = [[Option(kl[p.pattern], (size(p, LOW),)), Option(0.0, (size(p, HIGH),))] for p in parts]
    chosen = solve(items, [most_bytes])
    if chosen is None:
        return None
    high = {part.pattern for part, option in zip(parts, chosen, strict=True) if option == 1}
    overrides = {part.pattern: HIGH for part in parts if part.pattern in high and part.pattern.startswith("layers.")}
    settings = {
        "weights": LOW, "overrides": overrides, "activations": "int8-g32",
        "embedding": HIGH if "embedding.weight" in high else LOW,
    }  # fmt: skip
    if not config.tied:
        settings["head"] = HIGH if "head.weight" in high else LOW
    total = sum(items[index][option].weights[0] for index, option in enumerate(chosen))
    values = sum(shapes[name][0] * shapes[name][1] for part in parts for name in part.names)
    name = f"W4-8A8-g32-gptq-{8 * total / values:.2f}bit"
    return Recipe(name=name, seed=seed, steps=(Step(technique="gptq", settings=settings),))

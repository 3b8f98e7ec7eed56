"""Short names of recipes: `prune25+W4A8-g32-gptq` is read here and nowhere else.

A scheme is parts joined by '+', applied from left to right; `PARTS` lists them, one line each. The last
part usually says how weights are stored:

W{2-6,8}A{8,16} weights and activations; A8 rounds activations to int8 in groups of 32,
               A16 really computes with bf16 activations
-g{32,64,128}  weights that share a scale; 8-bit weights without it share one per row
-asym          4-bit weights with a minimum per group
-k             scales of two levels, as GGUF's Q2_K to Q6_K have them: W2 to W6
-gptq          choose codes with calibration text; without it round to nearest
-gptaq         the same, to give what the unchanged model gives behind the compressed layers
-guided        the same, with output errors weighed by gradients of the model's answers
-hqq           fit grids by a robust error, without text (HQQ)
-sign          learn which way to round, layer by layer, with calibration text (AutoRound)
-e{4,8,16}     bits of the embedding (and tied head); by default 8; with -k also 2, 3, 5 and 6
-kv{4,8,16,32} precision of the KV cache; by default bf16
f32, bf16, f16 floating point throughout
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trilemma.core.errors import RecipeError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats import FORMATS

_SUFFIX = re.compile(r"-(e|kv)(\d+)", re.IGNORECASE)
_EMBEDDING = {"4": "int4-g32", "8": "int8-g32", "16": "bf16"}
_K_FORMATS = {"2": "int2-g16-k", "3": "int3-g16-k", "4": "int4-g32-k", "5": "int5-g32-k", "6": "int6-g16-k"}
_EMBEDDING_K = _K_FORMATS | {"8": "int8-g32", "16": "bf16"}
_KV = {"4": "int4", "8": "int8", "16": "bf16", "32": "f32"}
# How codes are chosen, as a scheme says it -> the technique and its settings.
QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "hqq": ("hqq", {}),
    "gptq": ("gptq", {}),
    "gptaq": ("gptaq", {}),
    "guided": ("gptaq", {"guided": True}),
    "sign": ("sign-rounding", {}),
}
_TECHNIQUES = {technique for technique, _ in QUANTIZERS.values()}
_OF_FORMATS = ("weights", "embedding", "activations")
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
    "W4A8-g32-gptaq": "the same, to give what the unchanged model gives behind the compressed layers",
    "W4A8-g32-guided": "the same, guided by gradients of the model's answers: least KL, needs a backward pass",
    "W4A8-g32-asym-gptq": "4-bit weights with minima (GGUF Q4_1), codes chosen with calibration text",
    "W4A8-g64-gptq": "4-bit weights in groups of 64",
    "W4A8-g64-asym-gptq": "4-bit weights with minima in groups of 64",
    "W4A8-g128-gptq": "4-bit weights in groups of 128: the smallest",
    "W4A16-g32-gptq": "4-bit weights, 16-bit activations",
    "W4A16-g128-gptq": "4-bit weights in groups of 128, 16-bit activations",
    "W4A8-k-gptq": "4-bit weights with minima, scales of two levels (GGUF Q4_K), codes chosen with calibration text",
    "W4A8-k-guided": "the same grid; codes give what the unchanged model gives, guided by gradients of its answers",
    "W5A8-k-gptq": "5-bit weights on GGUF's Q5_K, codes chosen with calibration text",
    "W6A8-k": "6-bit weights on GGUF's Q6_K: close to 8 bits, needs no text",
    "W4A8-g32-gptq-e4": "4 bits for the embedding and head too",
    "W4A8-g32-gptq-kv8": "8-bit KV cache too",
    "W8A8-g32-kv8": "8 bits throughout",
}


@dataclass(frozen=True)
class Part:
    """One kind of part: `pattern` must match it whole (in any case), `steps(match)` are its recipe steps.

    example, what: a line of `trilemma list schemes`; none for parts that `SCHEMES` shows already.
    """

    pattern: str
    steps: Callable[[re.Match[str]], list[Step]]
    example: str = ""
    what: str = ""


def list_schemes() -> dict[str, str]:
    """Recommended schemes and an example of every part -> one line about each; parts are joined by '+'."""
    return SCHEMES | {part.example: part.what for part in PARTS if part.example}


def scheme_to_recipe(name: str, *, seed: int = 0) -> Recipe:
    """The recipe that a scheme's name stands for.

    Raises:
        RecipeError: it can not be read, or asks for a format that no table lists.
    """
    steps: list[Step] = []
    for part in name.split("+"):
        steps += _read_part(name, part)
    quantized = [step for step in steps if step.technique in _TECHNIQUES]
    if len(quantized) > 1:
        raise _unknown(name, "its weights would be quantized twice; one W part is enough")
    for place, step in enumerate(steps):
        if step.technique == "eora" and not any(each in quantized for each in steps[:place]):
            raise _unknown(name, "eora makes up for what a W part before it has lost: W3A8-g128-gptq+eora32")
        if step.technique == "awq":  # it looks ahead to the step that quantizes
            if not quantized or steps.index(quantized[0]) < place:
                raise _unknown(name, "awq prepares a W part that follows it: awq+W4A8-g32")
            formats = {key: value for key, value in quantized[0].settings.items() if key in _OF_FORMATS}
            steps[place] = step.model_copy(update={"settings": formats})
    return Recipe(name=name, seed=seed, steps=tuple(steps))


def _read_part(scheme: str, part: str) -> list[Step]:
    for kind in PARTS:
        match = re.fullmatch(kind.pattern, part, re.IGNORECASE)
        if match:
            try:
                return kind.steps(match)
            except ValueError as error:
                raise _unknown(scheme, str(error)) from None
    raise _unknown(scheme, f"its part '{part}' can not be read" if "+" in scheme else "it can not be read")


def _plain(match: re.Match[str]) -> list[Step]:
    return [Step(technique="plain", settings={"dtype": match["dtype"].lower()}), *_kv_steps(match["rest"])]


def _quantize(match: re.Match[str]) -> list[Step]:
    weights = _weights_format(match)
    settings: dict[str, Any] = {
        "weights": weights,
        "embedding": _embedding(match["rest"], weights),
        "activations": _pick("activation bits", match["activations"], _ACTIVATIONS),
    }
    technique, more = QUANTIZERS[(match["how"] or "rtn").lower()]
    return [Step(technique=technique, settings=settings | more), *_kv_steps(match["rest"])]


def _experts(match: re.Match[str]) -> list[Step]:
    settings: dict[str, Any] = {"count": int(match["count"]), "active": int(match["active"])}
    if match["shared"]:
        settings["shared"] = int(match["shared"]) / 100
    return [Step(technique="experts", settings=settings)]


def _smooth(match: re.Match[str]) -> list[Step]:
    return [Step(technique="smooth")]


def _awq(match: re.Match[str]) -> list[Step]:
    return [Step(technique="awq")]


def _rotate(match: re.Match[str]) -> list[Step]:
    return [Step(technique="rotate", settings={"tied": "untie"} if match["untie"] else {})]


def _tune(match: re.Match[str]) -> list[Step]:
    return [Step(technique="tune-norms", settings={"steps": int(match["steps"])})]


def _tune_scales(match: re.Match[str]) -> list[Step]:
    return [Step(technique="tune-scales", settings={"steps": int(match["steps"])})]


def _eora(match: re.Match[str]) -> list[Step]:
    if int(match["rank"]) < 1:
        raise ValueError("the rank of eora must be 1 or more")
    return [
        Step(technique="eora", settings={"rank": int(match["rank"])} | ({"guided": True} if match["guided"] else {}))
    ]


def _heal(match: re.Match[str]) -> list[Step]:
    return [Step(technique="heal", settings={"steps": int(match["steps"])})]


def _weights_format(match: re.Match[str]) -> str:
    if match["k"]:
        if match["how"] and match["how"].lower() == "hqq":
            raise ValueError("-hqq fits one level of scales, and -k has two: take -gptq, -gptaq, -guided or none")
        return _pick("weight bits with -k", "asym" if match["asym"] else match["weights"], _K_FORMATS)
    group = f"g{match['group']}" if match["group"] else "channel"
    wanted = f"int{match['weights']}-{group}{'-asym' if match['asym'] else ''}"
    if wanted not in FORMATS:
        valid = [name for name in FORMATS if name.startswith("int")]
        raise ValueError(f"it means the weight format '{wanted}', and the formats are {', '.join(valid)}")
    return wanted


def _embedding(rest: str, weights: str) -> str:
    bits = [value for kind, value in _SUFFIX.findall(rest) if kind.lower() == "e"]
    if not bits:
        return weights if FORMATS.get(weights).bits == 8 else "int8-g32"
    return _pick("embedding bits", bits[-1], _EMBEDDING_K if weights.endswith("-k") else _EMBEDDING)


def _kv_steps(rest: str) -> list[Step]:
    bits = [value for kind, value in _SUFFIX.findall(rest) if kind.lower() == "kv"]
    if not bits:
        return []
    return [Step(technique="kv-cache", settings={"precision": _pick("KV cache bits", bits[-1], _KV)})]


def _pick(what: str, value: str, table: dict[str, str]) -> str:
    if value not in table:
        raise ValueError(f"{what} must be {', '.join(table)}, not {value}")
    return table[value]


def _width(match: re.Match[str]) -> list[Step]:
    parts = {"prune": "both", "ffn": "ffn", "heads": "heads"}[match["what"].lower()]
    settings: dict[str, Any] = {"share": _share(match["percent"]), "parts": parts}
    if match["even"]:
        settings["allocation"] = "uniform"
    return [Step(technique="prune-width", settings=settings)]


def _depth(match: re.Match[str]) -> list[Step]:
    settings = {"share": _share(match["percent"]), "unit": match["what"].lower()}
    return [Step(technique="prune-depth", settings=settings)]


def _sparse(match: re.Match[str]) -> list[Step]:
    settings: dict[str, Any] = (
        {"pattern": match["pattern"]} if match["pattern"] else {"share": _share(match["percent"])}
    )
    name = match["what"].lower()
    if name == "sparsegpt":
        name, settings["update"] = "wanda", True
    return [Step(technique=name, settings=settings)]


def _kv_heads(match: re.Match[str]) -> list[Step]:
    return [Step(technique="kv-heads", settings={"heads": int(match["heads"])})]


def _share(percent: str) -> float:
    """'25' -> 0.25. Raises ValueError outside 1..95."""
    if not 1 <= int(percent) <= 95:
        raise ValueError(f"the percentage to remove must lie between 1 and 95, not {percent}")
    return int(percent) / 100


def _unknown(name: str, why: str) -> RecipeError:
    return RecipeError(
        f"Unknown scheme '{name}': {why}. A scheme looks like W8A8, W4A8-g32-gptq, W4A16-g128, "
        "W4A8-g64-asym-gptq-kv8 or bf16, other parts may stand before it (prune25+W4A8-g32-gptq); "
        "`trilemma list schemes` shows them."
    )


_PRUNE = (
    "first remove 25% of layer weights as FFN channels and heads (ffn25, heads25: those alone; -even: all layers alike)"
)
_LAYERS = "first remove the layers that cost least KL, about 25% (parts25: attention or FFN parts): smaller, faster"
_WANDA = "half the weights zero (also magnitude50, sparsegpt50, wanda2:4): shows the loss, saves no bytes and no time"
_ROTATE = "turn the residual stream and values so that no channel stands out (QuaRot); -untie: of a tied head too"
_KV_HEADS = "merge key-value heads into 2 a layer: a smaller KV cache"

# A new part is one line here; the first pattern that matches decides.
PARTS: tuple[Part, ...] = (
    Part(r"(?P<dtype>f32|bf16|f16)(?P<rest>(?:-kv\d+)*)", _plain),
    Part(
        r"W(?P<weights>\d+)A(?P<activations>\d+)(?:-g(?P<group>\d+)|(?P<k>-k))?(?P<asym>-asym)?"
        r"(?:-(?P<how>gptq|gptaq|guided|hqq|sign))?"
        r"(?P<rest>(?:-(?:e|kv)\d+)*)",
        _quantize,
    ),
    Part(r"(?P<what>prune|ffn|heads)(?P<percent>\d+)(?P<even>-even)?", _width, "prune25+W4A8-g32-gptq", _PRUNE),
    Part(r"(?P<what>layers|parts)(?P<percent>\d+)", _depth, "layers25+W4A8-g32-gptq", _LAYERS),
    Part(r"(?P<what>magnitude|wanda|sparsegpt)(?:(?P<percent>\d+)|(?P<pattern>\d+:\d+))", _sparse, "wanda50", _WANDA),
    Part(r"kvheads(?P<heads>\d+)", _kv_heads, "kvheads2+bf16", _KV_HEADS),
    Part(
        r"experts(?P<count>\d+)x(?P<active>\d+)(?:-s(?P<shared>\d+))?",
        _experts,
        "experts8x4",
        "feed-forward blocks become 8 experts, of which 4 run for a token, and a shared quarter (-s25)",
    ),
    Part("smooth", _smooth, "smooth+W8A8-g32", "move activation outliers into the weights first (SmoothQuant)"),
    Part(r"rotate(?P<untie>-untie)?", _rotate, "rotate+W4A8-g32-gptq", _ROTATE),
    Part("awq", _awq, "awq+W4A8-g128-gptq", "scale channels first so that those that matter round finer (AWQ)"),
    Part(
        r"tune(?P<steps>\d+)",
        _tune,
        "W4A8-g32-gptq+tune100",
        "then train norms and biases alone for 100 steps to answer like the original",
    ),
    Part(
        r"scales(?P<steps>\d+)",
        _tune_scales,
        "W4A8-g32-gptq+scales100",
        "then train scales, norms and biases for 100 steps to answer like the original: same codes, same bytes",
    ),
    Part(
        r"eora(?P<rank>\d+)(?P<guided>-guided)?",
        _eora,
        "W3A8-g128-gptq+eora32",
        "then pairs of rank 32 in 8 bits that make up for each matrix's error (EoRA); -guided: weighed by gradients",
    ),
    Part(
        r"heal(?P<steps>\d+)",
        _heal,
        "prune25+heal200+W4A8-g32-gptq",
        "train for 200 steps to answer like the original, before quantization",
    ),
)

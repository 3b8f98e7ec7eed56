"""Rotary position embedding: inverse frequencies and attention factor of the scalings in use.

The formulas are those of transformers' `modeling_rope_utils`, computed in f64 and rounded to f32 once.
`dynamic` (NTK) changes nothing inside the trained context, which is all that we run. `longrope`
(arXiv:2402.13753, Phi-3) takes another table once a sequence outgrows the original context; we run it
up to there, with the table for short sequences, and keep the other one for writing the config back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import CheckpointError, UnsupportedModelError
from trilemma.model.config import Rope

Float64 = NDArray[np.float64]
RopeKind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]

# kind -> (required keys, optional keys); original_max_position_embeddings falls back to the model's context
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim", "truncate",
        ),
    ),
    "longrope": (("short_factor", "long_factor"), ("original_max_position_embeddings", "attention_factor", "factor")),
}  # fmt: skip
_IGNORED = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}
_SHARE, _ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


def read_rope(
    raw: Mapping[str, Any],
    *,
    head_dim: int,
    max_context: int,
    default_theta: float = 10000.0,
    kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic"),
    default_share: float | None = None,
) -> Rope:
    """The rope of a config.json, in the old (`rope_scaling`) or the new (`rope_parameters`) spelling.

    Args:
        raw: the content of config.json.
        head_dim: dimensions of one head.
        max_context: `max_position_embeddings`; stands in for a missing original_max_position_embeddings.
        default_theta: what the family takes where the config is silent.
        kinds: those that the family has.
        default_share: share of a head's dimensions that rotate, where the config is silent; None for a family
            whose heads always rotate whole.

    Raises:
        CheckpointError: a parameter is missing or no number.
        UnsupportedModelError: a kind of rope, or a parameter of it, that we do not run.
    """
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: the rope parameters are {found!r}; expected an object.")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise UnsupportedModelError("config.json: 'rope_parameters' differ by layer type, which we do not run.")
    kind = found.get("rope_type", found.get("type")) or "default"
    if kind not in kinds:
        raise UnsupportedModelError(
            f"config.json: rope type '{kind}' is not implemented here. Supported: {', '.join(kinds)}."
        )
    share = _share(raw, found, default_share)
    theta = _number(found.get("rope_theta", raw.get("rope_theta")), "rope_theta", default_theta)
    parameters = _parameters(kind, found, raw, max_context)
    if share != 1.0:
        parameters[_SHARE] = share
    rotating = rotary_dim(head_dim, parameters)
    if rotating < 2 or rotating % 2:
        raise CheckpointError(
            f"config.json: {share:g} of a head's {head_dim} dimensions rotate, that is {rotating}; "
            "rotary embedding needs an even number of them."
        )
    if kind == "longrope":
        parameters |= _longrope_lists(found, rotating // 2) | {"max_position_embeddings": float(max_context)}
    return make_rope(cast(RopeKind, kind), theta, parameters, head_dim=head_dim)


def rotary_dim(head_dim: int, parameters: Mapping[str, float]) -> int:
    """How many of a head's dimensions rotate, rounded as transformers rounds."""
    return int(head_dim * parameters.get(_SHARE, 1.0))


def _share(raw: Mapping[str, Any], found: Mapping[str, Any], default: float | None) -> float:
    value = found.get(_SHARE, raw.get(_SHARE))
    if default is None:
        if value not in (None, 1, 1.0):
            raise UnsupportedModelError(f"config.json: '{_SHARE}' is {value!r}; supported: 1.0.")
        return 1.0
    share = _number(value, _SHARE, default)
    if not 0 < share <= 1:
        raise CheckpointError(f"config.json: '{_SHARE}' is {value!r}; expected a number above 0, at most 1.")
    return share


def make_rope(kind: RopeKind, theta: float, parameters: dict[str, float], *, head_dim: int) -> Rope:
    """A Rope with its tables computed from complete parameters."""
    rotating = rotary_dim(head_dim, parameters)
    base = theta ** (-np.arange(0, rotating, 2, dtype=np.float64) / rotating)  # (rotating / 2,)
    factor = 1.0
    if kind == "linear":
        base = base / parameters["factor"]
    elif kind == "llama3":
        base = _llama3(base, parameters)
    elif kind == "yarn":
        base, factor = _yarn(base, theta, rotating, parameters)
    elif kind == "longrope":
        base, factor = base / _listed(parameters, "short_factor"), _longrope_attention_factor(parameters)
    table = tuple(float(value) for value in base.astype(np.float32))
    return Rope(theta=theta, kind=kind, parameters=parameters, inverse_frequencies=table, attention_factor=factor)


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the spelling that every release of transformers reads.

    A share of rotating dimensions is the family's to write: its key has many names.
    """
    written: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.kind == "longrope":
        longrope: dict[str, Any] = {"type": "longrope"}
        longrope |= {key: _listed(rope.parameters, key).tolist() for key in ("short_factor", "long_factor")}
        longrope |= {key: rope.parameters[key] for key in ("attention_factor", "factor") if key in rope.parameters}
        return written | {"rope_scaling": longrope}
    if rope.kind != "default":
        scaling: dict[str, Any] = {"rope_type": rope.kind, **rope.parameters}
        scaling.pop(_SHARE, None)
        if "original_max_position_embeddings" in scaling:
            scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
        if "truncate" in scaling:
            scaling["truncate"] = bool(scaling["truncate"])
        written["rope_scaling"] = scaling
    return written


def context_with_rope(rope: Rope, max_context: int) -> int:
    """The context a config means: yarn configs often keep the length from before the scaling; longrope ends at it."""
    if rope.kind == "longrope":
        return min(max_context, int(rope.parameters[_ORIGINAL]))
    if rope.kind != "yarn":
        return max_context
    stretched = rope.parameters["factor"] * rope.parameters["original_max_position_embeddings"]
    return max(max_context, int(stretched))


def _parameters(kind: str, found: Mapping[str, Any], raw: Mapping[str, Any], max_context: int) -> dict[str, float]:
    required, optional = _KEYS[kind]
    unknown = sorted(set(found) - {*required, *optional, *_IGNORED}) if kind != "default" else []
    if unknown:
        raise UnsupportedModelError(
            f"config.json: rope parameter '{unknown[0]}' of rope type '{kind}' is not understood. "
            f"Known: {', '.join((*required, *optional))}."
        )
    parameters: dict[str, float] = {}
    for key in required:
        if key not in found:
            raise CheckpointError(f"config.json: rope type '{kind}' needs '{key}', which is missing.")
    for key in (*required, *optional):
        if found.get(key) is not None and not key.endswith(("short_factor", "long_factor")):
            parameters[key] = _number(found[key], key)
    if "original_max_position_embeddings" in optional:
        outside = raw.get("original_max_position_embeddings")
        if outside is not None:
            parameters["original_max_position_embeddings"] = _number(outside, "original_max_position_embeddings")
        parameters.setdefault("original_max_position_embeddings", float(max_context))
    return parameters


def _number(value: Any, key: str, default: float | None = None) -> float:
    if value is None and default is not None:
        return default
    if key == "truncate" and isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise CheckpointError(f"config.json: rope parameter '{key}' is {value!r}; expected a number above 0.")
    if value == 0 and key in ("factor", "rope_theta", "original_max_position_embeddings"):
        raise CheckpointError(f"config.json: rope parameter '{key}' is 0; expected a number above 0.")
    return float(value)


def _llama3(base: Float64, p: Mapping[str, float]) -> Float64:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a smooth step between."""
    original, factor = p["original_max_position_embeddings"], p["factor"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    wavelength = 2 * math.pi / base
    smooth = (original / wavelength - low) / (high - low) if high != low else np.zeros_like(base)
    between = (1 - smooth) * base / factor + smooth * base
    scaled = np.where(wavelength > original / low, base / factor, base)
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(medium, between, scaled)


def _yarn(base: Float64, theta: float, dim: int, p: Mapping[str, float]) -> tuple[Float64, float]:
    """YaRN (arXiv:2309.00071): interpolate slow dimensions, keep fast ones, and sharpen attention."""
    original, factor = p["original_max_position_embeddings"], p["factor"]

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(p.get("beta_fast") or 32.0), dimension_of(p.get("beta_slow") or 1.0)
    if p.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    keep = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    table = base / factor * (1 - keep) + base * keep
    return table, _yarn_attention_factor(factor, p)


def _yarn_attention_factor(factor: float, p: Mapping[str, float]) -> float:
    if "attention_factor" in p:
        return p["attention_factor"]

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)


def _longrope_lists(found: Mapping[str, Any], half: int) -> dict[str, float]:
    """Both lists of divisors (half,) as parameters 'short_factor.0', 'short_factor.1', ..."""
    parameters: dict[str, float] = {}
    for key in ("short_factor", "long_factor"):
        values = found[key]
        if not isinstance(values, list) or len(values) != half:
            raise CheckpointError(f"config.json: rope parameter '{key}' must be a list of {half} numbers.")
        for index, value in enumerate(values):
            parameters[f"{key}.{index}"] = _number(value, key)
            if not parameters[f"{key}.{index}"]:
                raise CheckpointError(f"config.json: rope parameter '{key}' holds a 0; expected numbers above 0.")
    return parameters


def _listed(parameters: Mapping[str, float], key: str) -> Float64:
    values = [value for name, value in parameters.items() if name.rpartition(".")[0] == key]
    return np.asarray(values, dtype=np.float64)


def _longrope_attention_factor(p: Mapping[str, float]) -> float:
    if "attention_factor" in p:
        return p["attention_factor"]
    factor = p.get("factor", p["max_position_embeddings"] / p[_ORIGINAL])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(p[_ORIGINAL]))

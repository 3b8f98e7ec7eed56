"""From a model and a scheme to what it would cost on a device: counts of bytes and products, then the roofline, or
the sum of kernel times where the profile has them (`trilemma profile`).

No weight is read and nothing is built. Schemes whose result is not known before the work is done (some
restructuring) are refused; build the model and ask about the artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trilemma.core.device import Arithmetic, Device
from trilemma.core.duty import DutyCycle
from trilemma.core.errors import InputError
from trilemma.formats.pack import format_bytes
from trilemma.measure.device import step_time
from trilemma.measure.device.device_model import Demand, Forecast, forecast
from trilemma.measure.energy.model_energy import ARITHMETIC
from trilemma.model.cost import (
    attention_macs_per_token,
    decode_bytes_per_token,
    expert_shares,
    kv_bytes,
    prompt_attention_macs,
    prompt_rows,
    weights_bytes,
)
from trilemma.model.model import Activation, Model
from trilemma.techniques.cost_twin import recipe_runs
from trilemma.techniques.schemes import scheme_to_recipe

AS_IT_IS = "as it is"
SCHEMES = (AS_IT_IS, "W8A8-g32", "W4A8-g32", "W4A8-g128")


@dataclass(frozen=True)
class Form:
    """A model in one form, by arithmetic: format and input precision of every matrix, and the cache."""

    format_of: Callable[[str], str]
    activation_of: Callable[[str], Activation]
    kv_cache: str


def forecast_schemes(
    model: Model,
    device: Device,
    *,
    schemes: Sequence[str] = SCHEMES,
    context: int | None = None,
    output_tokens: int = 64,
    duty: DutyCycle | None = None,
) -> dict[str, Forecast]:
    """A forecast of the model on the device in each scheme.

    Args:
        schemes: names as `trilemma list schemes` has them; 'as it is' is the model's own form.
        context: prompt and answer together; by default 512 or the model's own.
        output_tokens: of the answer.
        duty: how often it answers, for battery hours.

    Raises:
        RecipeError: a scheme that can not be read, or whose result can not be known beforehand.
        InputError: lengths that the model's context does not hold.
    """
    length = context or min(512, model.config.max_context)
    if not output_tokens + 1 <= length <= model.config.max_context:
        raise InputError(
            f"A context of {length} does not fit: it must hold a prompt and {output_tokens} output tokens, and the "
            f"model takes {model.config.max_context}."
        )
    return {
        scheme: _forecast(model, device, form_of(model, scheme), length - output_tokens, output_tokens, duty)
        for scheme in schemes
    }


def forecast_model(
    model: Model, device: Device, *, prompt_tokens: int, output_tokens: int, duty: DutyCycle | None = None
) -> Forecast:
    """The forecast of a model in its own form: a built artifact, or the original."""
    return _forecast(model, device, form_of(model, AS_IT_IS), prompt_tokens, output_tokens, duty)


def _forecast(
    model: Model, device: Device, form: Form, prompt_tokens: int, output_tokens: int, duty: DutyCycle | None
) -> Forecast:
    """From kernel times where the profile has them (and the model a cache), else by the roofline."""
    times = None
    if device.host is not None and form.kv_cache != "none":
        steps = step_time.Form(model.config, form.format_of, form.activation_of, form.kv_cache)
        times = step_time.StepTimes(device).times(steps, prompt_tokens, output_tokens)
    return forecast(device, demand_of(model, form, prompt_tokens, output_tokens), duty, times)


def form_of(model: Model, scheme: str) -> Form:
    """Formats, input precisions and cache that a scheme leaves."""
    if scheme == AS_IT_IS:
        return Form(model.format_of, lambda name: model.linear(name).activation, model.run.kv_cache)
    formats, activations, kv = recipe_runs(model, scheme_to_recipe(scheme))
    return Form(
        lambda name: formats.get(name, model.format_of(name)),
        lambda name: activations.get(name, model.linear(name).activation),
        kv,
    )


def demand_of(model: Model, form: Form, prompt_tokens: int, output_tokens: int) -> Demand:
    """Bytes and multiply-accumulates of a request of the stated lengths."""
    config = model.config
    length, middle = prompt_tokens + output_tokens, prompt_tokens + output_tokens // 2
    resident = weights_bytes(config, form.format_of, format_bytes)
    # without a cache every step does the whole history again
    recomputed = form.kv_cache == "none"
    seen = prompt_attention_macs(config, middle) if recomputed else attention_macs_per_token(config, middle)
    return Demand(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, weights_bytes=resident,
        kv_bytes=kv_bytes(config, form.kv_cache, length),
        read_bytes=decode_bytes_per_token(config, form.format_of, form.kv_cache, middle, format_bytes),
        macs=_plus(_matrix_macs(model, form, middle if recomputed else 1), {"f32": float(seen)}),
        prefill_bytes=resident,
        prefill_macs=_plus(
            _matrix_macs(model, form, prompt_tokens), {"f32": float(prompt_attention_macs(config, prompt_tokens))}
        ),
    )  # fmt: skip


def _matrix_macs(model: Model, form: Form, tokens: int) -> dict[Arithmetic, float]:
    """Products of a prompt's matrices by precision; of experts, the share of tokens that chooses each."""
    config = model.config
    shapes, shares = config.tensor_shapes(), expert_shares(config)
    counts: dict[Arithmetic, float] = {_head_precision(model, form): float(config.vocab_size * config.dim)}
    for name in config.linear_names():
        size = float(shapes[name][0] * shapes[name][1] * shares.get(name, 1))
        counts = _plus(counts, {ARITHMETIC[form.activation_of(name)]: size * prompt_rows(config, name, tokens)})
    return counts


def _head_precision(model: Model, form: Form) -> Arithmetic:
    return ARITHMETIC[form.activation_of("embedding.weight" if model.config.tied else "head.weight")]


def _plus(*counts: dict[Arithmetic, float]) -> dict[Arithmetic, float]:
    total: dict[Arithmetic, float] = {}
    for each in counts:
        for precision, count in each.items():
            total[precision] = total.get(precision, 0.0) + count
    return total


__all__ = ["AS_IT_IS", "SCHEMES", "Form", "demand_of", "forecast_model", "forecast_schemes", "form_of"]

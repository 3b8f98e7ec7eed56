"""Energy of a model's requests: the engine's times, joined with what its formats read and multiply for a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from trilemma.core.device import Arithmetic
from trilemma.core.measurement import Measurement
from trilemma.measure.bench import decode_bytes
from trilemma.measure.energy.per_token import energy_per_token
from trilemma.measure.energy.sensors import Sensor
from trilemma.model.cost import macs_per_token
from trilemma.model.model import Activation, Model
from trilemma.runtime.engine import Engine

ARITHMETIC: dict[Activation, Arithmetic] = {"f32": "f32", "bf16": "bf16", "int8-g32": "int8"}


def model_energy(
    model: Model,
    engine: Engine,
    times: Mapping[str, Measurement],
    *,
    prompt_tokens: int,
    output_tokens: int,
    sensors: Sequence[Sensor] | None = None,
) -> dict[str, Measurement]:
    """Energy per token by counter where there is one, else estimated from the measured times.

    Args:
        engine: `model`, open.
        times: its `tpot_s` and `ttft_s` for requests of these lengths.
        sensors: by default all of this host.
    """
    position = prompt_tokens + output_tokens // 2
    return energy_per_token(
        engine, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        read_bytes_per_token=decode_bytes(model, engine.kv_cache, position),
        macs_per_token=macs_per_token(model.config, position), precision=precision_of(model), sensors=sensors,
        tpot_s=times["tpot_s"].value, ttft_s=times["ttft_s"].value,
    )  # fmt: skip


def precision_of(model: Model) -> Arithmetic:
    """Of most multiplications: that of the inputs which most matrices take."""
    inputs = Counter(model.linear(name).activation for name in model.config.linear_names())
    return ARITHMETIC[inputs.most_common(1)[0][0]] if inputs else "f32"

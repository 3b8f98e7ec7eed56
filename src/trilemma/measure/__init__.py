"""What a model costs and how good it is. One file a subject; `METERS` says where each metric is measured.

A new metric is a row in `core/metric.py` (name, unit, direction), a file here, and a line in this table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trilemma.core.registry import Registry

METERS: Registry[Callable[..., Any]] = Registry(
    "meter",
    {
        "weights_bytes": "trilemma.measure.memory:engine_memory",
        "artifact_bytes": "trilemma.measure.memory:artifact_bytes",
        "engine_memory_bytes": "trilemma.measure.memory:engine_memory",
        "peak_memory_bytes": "trilemma.measure.memory:peak_memory",
        "kv_bytes_per_token": "trilemma.measure.memory:engine_memory",
        "ttft_s": "trilemma.measure.speed:measure_speed",
        "tpot_s": "trilemma.measure.speed:measure_speed",
        "itl_s": "trilemma.measure.speed:measure_speed",
        "prefill_tokens_per_s": "trilemma.measure.speed:measure_speed",
        "decode_tokens_per_s": "trilemma.measure.speed:measure_speed",
        "throughput_tokens_per_s": "trilemma.measure.batch_sweep:batch_sweep",
        "energy_j_per_output_token": "trilemma.measure.energy:energy_per_token",
        "energy_j_per_total_token": "trilemma.measure.energy:energy_per_token",
        "power_w": "trilemma.measure.energy:energy_per_token",
        "idle_power_w": "trilemma.measure.energy:energy_per_token",
        "battery_h": "trilemma.measure.device_model:forecast",
        "build_s": "trilemma.measure.build_cost:BuildMeter",
        "build_energy_j": "trilemma.measure.build_cost:BuildMeter",
        "perplexity": "trilemma.measure.quality:perplexity_of",
        "bits_per_byte": "trilemma.measure.quality:perplexity_of",
        "ppl_increase": "trilemma.measure.quality:evaluate",
        "kl_mean": "trilemma.measure.quality:evaluate",
        "kl_p99": "trilemma.measure.quality:evaluate",
        "kl_p999": "trilemma.measure.quality:evaluate",
        "top1_agreement": "trilemma.measure.quality:evaluate",
    },
)

__all__ = ["METERS"]

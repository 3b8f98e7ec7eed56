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
        "weights_bytes": "trilemma.measure.memory.held:engine_memory",
        "artifact_bytes": "trilemma.measure.memory.held:artifact_bytes",
        "engine_memory_bytes": "trilemma.measure.memory.held:engine_memory",
        "peak_memory_bytes": "trilemma.measure.memory.held:peak_memory",
        "kv_bytes_per_token": "trilemma.measure.memory.held:engine_memory",
        "ttft_s": "trilemma.measure.timing.speed:measure_speed",
        "tpot_s": "trilemma.measure.timing.speed:measure_speed",
        "itl_s": "trilemma.measure.timing.speed:measure_speed",
        "itl_p99_s": "trilemma.measure.timing.speed:measure_speed",
        "prefill_tokens_per_s": "trilemma.measure.timing.speed:measure_speed",
        "decode_tokens_per_s": "trilemma.measure.timing.speed:measure_speed",
        "throughput_tokens_per_s": "trilemma.measure.timing.batch_sweep:batch_sweep",
        "energy_j_per_output_token": "trilemma.measure.energy.per_token:energy_per_token",
        "energy_j_per_total_token": "trilemma.measure.energy.per_token:energy_per_token",
        "power_w": "trilemma.measure.energy.per_token:energy_per_token",
        "idle_power_w": "trilemma.measure.energy.per_token:energy_per_token",
        "battery_h": "trilemma.measure.device.device_model:forecast",
        "build_s": "trilemma.measure.energy.build_cost:BuildMeter",
        "build_energy_j": "trilemma.measure.energy.build_cost:BuildMeter",
        "perplexity": "trilemma.measure.quality.figures:perplexity_of",
        "word_perplexity": "trilemma.measure.quality.figures:perplexity_of",
        "byte_perplexity": "trilemma.measure.quality.figures:perplexity_of",
        "bits_per_byte": "trilemma.measure.quality.figures:perplexity_of",
        "ppl_increase": "trilemma.measure.quality.figures:evaluate",
        "kl_mean": "trilemma.measure.quality.figures:evaluate",
        "kl_p99": "trilemma.measure.quality.figures:evaluate",
        "kl_p999": "trilemma.measure.quality.figures:evaluate",
        "top1_agreement": "trilemma.measure.quality.figures:evaluate",
        "accuracy/<task>": "trilemma.measure.quality.tasks.figures:task_row",
        "accuracy_norm/<task>": "trilemma.measure.quality.tasks.figures:task_row",
        "accuracy_change/<task>": "trilemma.measure.quality.tasks.figures:task_row",
        "repetition_rate": "trilemma.measure.quality.answers:answer_figures",
        "looping_rate": "trilemma.measure.quality.answers:answer_figures",
        "empty_rate": "trilemma.measure.quality.answers:answer_figures",
        "answer_tokens": "trilemma.measure.quality.answers:answer_figures",
        "changed_answers": "trilemma.measure.quality.answers:answer_figures",
        "agreed_tokens": "trilemma.measure.quality.answers:answer_figures",
    },
)

__all__ = ["METERS"]

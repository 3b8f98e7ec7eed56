"""Trilemma: ship a language model within limits, and know how you know.

The public API, loaded on first use; importing this imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilemma.api import bench, bench_batches, bench_contexts, compress, export_model, inspect, optimize
    from trilemma.core.errors import TrilemmaError
    from trilemma.core.limit import Limit
    from trilemma.core.measurement import Measurement
    from trilemma.core.recipe import Recipe
    from trilemma.core.verdict import Verdict
    from trilemma.measure.compare import compare
    from trilemma.measure.quality.evaluate import evaluate
    from trilemma.runtime.cascade import open_cascade
    from trilemma.runtime.cascade_record import CascadeRule
    from trilemma.runtime.engine import EngineOptions, SamplingSettings
    from trilemma.runtime.speculative import open_speculative
    from trilemma.runtime.text_model import TextModel
    from trilemma.runtime.text_model import open_text_model as open
    from trilemma.search.cascade import calibrate_cascade
    from trilemma.search.check import check
    from trilemma.search.diagnosis.diagnose import diagnose
    from trilemma.search.distillation import distill
    from trilemma.search.ladder import measure_ladder as ladder
    from trilemma.search.strategies.advise import advise
    from trilemma.search.waterfall import waterfall

_WHERE = {
    "CascadeRule": "runtime.cascade_record",
    "EngineOptions": "runtime.engine",
    "Limit": "core.limit",
    "Measurement": "core.measurement",
    "Recipe": "core.recipe",
    "SamplingSettings": "runtime.engine",
    "TextModel": "runtime.text_model",
    "TrilemmaError": "core.errors",
    "Verdict": "core.verdict",
    "advise": "search.strategies.advise",
    "bench": "api",
    "bench_batches": "api",
    "bench_contexts": "api",
    "calibrate_cascade": "search.cascade",
    "check": "search.check",
    "compare": "measure.compare",
    "compress": "api",
    "diagnose": "search.diagnosis.diagnose",
    "distill": "search.distillation",
    "evaluate": "measure.quality.evaluate",
    "export_model": "api",
    "inspect": "api",
    "ladder": "search.ladder:measure_ladder",
    "open": "runtime.text_model:open_text_model",
    "open_cascade": "runtime.cascade",
    "open_speculative": "runtime.speculative",
    "optimize": "api",
    "waterfall": "search.waterfall",
}

__all__ = [
    "CascadeRule",
    "EngineOptions",
    "Limit",
    "Measurement",
    "Recipe",
    "SamplingSettings",
    "TextModel",
    "TrilemmaError",
    "Verdict",
    "advise",
    "bench",
    "bench_batches",
    "bench_contexts",
    "calibrate_cascade",
    "check",
    "compare",
    "compress",
    "diagnose",
    "distill",
    "evaluate",
    "export_model",
    "inspect",
    "ladder",
    "open",
    "open_cascade",
    "open_speculative",
    "optimize",
    "waterfall",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'trilemma' has no attribute '{name}'. Public names: {', '.join(__all__)}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(importlib.import_module(f"trilemma.{module}"), attribute or name)


def __dir__() -> list[str]:
    return __all__

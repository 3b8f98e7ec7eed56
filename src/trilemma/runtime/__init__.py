"""How a model runs: engines behind one protocol."""

from __future__ import annotations

from pathlib import Path

from trilemma.core.registry import Registry
from trilemma.model.model import Model
from trilemma.runtime.engine import Engine, EngineOptions, SamplingSettings

ENGINES: Registry[type[Engine]] = Registry(
    "engine",
    {
        "native": "trilemma.runtime.native:NativeEngine",
        "torch": "trilemma.runtime.reference:ReferenceEngine",
        "torch-bf16": "trilemma.runtime.reference:Bf16ReferenceEngine",
        "torch-f16": "trilemma.runtime.reference:F16ReferenceEngine",
        "llama.cpp": "trilemma.runtime.llama_cpp:LlamaCppEngine",
    },
)


def open_engine(model: Model | str | Path, *, runtime: str = "native", options: EngineOptions | None = None) -> Engine:
    """Open a model (or a folder: checkpoint, artifact, bare config.json) in an engine."""
    from trilemma.formats.artifact import load_any

    loaded = model if isinstance(model, Model) else load_any(model)
    return ENGINES.get(runtime)(loaded, options or EngineOptions())  # type: ignore[call-arg]


__all__ = ["ENGINES", "Engine", "EngineOptions", "SamplingSettings", "open_engine"]

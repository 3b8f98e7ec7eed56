"""How a model gets smaller. Each technique is one file: pure tensor functions plus a settings record."""

from __future__ import annotations

from trilemma.core.registry import Registry
from trilemma.techniques.technique import Build, Technique, TechniqueSettings

TECHNIQUES: Registry[type[Technique]] = Registry(
    "technique",
    {
        "plain": "trilemma.techniques.quantize.plain:Plain",
        "rtn": "trilemma.techniques.quantize.rtn:RoundToNearest",
        "gptq": "trilemma.techniques.quantize.gptq:Gptq",
        "smooth": "trilemma.techniques.quantize.smooth:Smooth",
        "kv-cache": "trilemma.techniques.quantize.kv_cache:KvCache",
    },
)

__all__ = ["TECHNIQUES", "Build", "Technique", "TechniqueSettings"]

"""How a model gets smaller. Each technique is one file: pure tensor functions plus a settings record."""

from __future__ import annotations

from trilemma.core.registry import Registry
from trilemma.techniques.technique import Build, Technique, TechniqueSettings

TECHNIQUES: Registry[type[Technique]] = Registry(
    "technique",
    {
        "plain": "trilemma.techniques.quantize.plain:Plain",
        "rtn": "trilemma.techniques.quantize.rtn:RoundToNearest",
        "hqq": "trilemma.techniques.quantize.hqq:Hqq",
        "gptq": "trilemma.techniques.quantize.gptq:Gptq",
        "gptaq": "trilemma.techniques.quantize.gptaq:Gptaq",
        "sign-rounding": "trilemma.techniques.quantize.sign_rounding:SignRounding",
        "eora": "trilemma.techniques.quantize.eora:Eora",
        "rotate": "trilemma.techniques.quantize.rotate:Rotate",
        "awq": "trilemma.techniques.quantize.awq:Awq",
        "tune-norms": "trilemma.techniques.distill.tune_norms:TuneNorms",
        "tune-scales": "trilemma.techniques.distill.tune_scales:TuneScales",
        "experts": "trilemma.techniques.restructure.experts:MakeExperts",
        "smooth": "trilemma.techniques.quantize.smooth:Smooth",
        "prune-width": "trilemma.techniques.prune.width:PruneWidth",
        "prune-depth": "trilemma.techniques.prune.depth:PruneDepth",
        "kv-heads": "trilemma.techniques.restructure.kv_heads:KvHeads",
        "magnitude": "trilemma.techniques.prune.unstructured:Magnitude",
        "wanda": "trilemma.techniques.prune.unstructured:Wanda",
        "heal": "trilemma.techniques.distill.heal:Heal",
        "distill": "trilemma.techniques.distill.student:Distill",
        "kv-cache": "trilemma.techniques.quantize.kv_cache:KvCache",
    },
)

__all__ = ["TECHNIQUES", "Build", "Technique", "TechniqueSettings"]

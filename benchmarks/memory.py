"""Memory predicted from headers beside memory measured: the table of docs/concepts/memory.md.

    python benchmarks/memory.py [--quick] [--model examples/models/hearth-7m]

Each case is a fresh process that opens, prefills and decodes; what its engine counts and its high-water resident set
stand beside what `trilemma inspect --prompt --output` says before anything is loaded. Nothing here depends on how
fast the machine is or what else it does. Exits with 1 when an engine is off by more than 2%, or a process by more
than 5% + 20 MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trilemma.formats.artifact import load_any, write_artifact
from trilemma.measure.memory.forecast import PEAK_ERROR, PEAK_ERROR_BYTES
from trilemma.measure.memory.held import peak_memory
from trilemma.runtime.engine import EngineOptions, KvCache
from trilemma.search.forecast import AS_IT_IS
from trilemma.search.memory_outlook import forecast_schemes_memory
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.schemes import scheme_to_recipe

ENGINE_ERROR = 0.02
OUTPUT = 4
SHAPES = Path(__file__).resolve().parent.parent / "examples" / "shapes"
HEARTH = Path(__file__).resolve().parent.parent / "examples" / "models" / "hearth-7m"
FORMS = (AS_IT_IS, "f32", "W8A8-g32", "W4A8-g32")
POLICIES: tuple[KvCache, ...] = ("none", "f32", "bf16", "int8")
HEADERS = ("model", "form", "KV", "tokens", "threads", "engine, predicted", "measured", "off by", "process, predicted",
           "measured", "off by", "")  # fmt: skip

EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 192, "intermediate_size": 1024, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One process: a model in a form, a cache policy, prompt and output together, threads."""

    model: Path
    form: str = AS_IT_IS
    kv: KvCache | None = None
    tokens: int = 128
    threads: int = 1


def cases(hearth: Path, experts: Path, *, quick: bool) -> list[Case]:
    """Every form, policy, context and number of threads at least once; all pairs on the smallest model."""
    small, larger = SHAPES / "SmolLM2-135M", SHAPES / "SmolLM2-360M"
    found = [Case(hearth, form, kv, 512) for form in FORMS for kv in POLICIES]
    found += [Case(hearth, AS_IT_IS, None, tokens, threads) for tokens in (16, 128) for threads in (1, 2)]
    found += [Case(small), Case(small, "W4A8-g32", "int8", 512, 2)]
    if quick:
        return found
    found += [Case(small, form, None, 1024) for form in FORMS]
    found += [Case(small, AS_IT_IS, kv, 2048, 2) for kv in ("f32", "bf16", "int8")]
    found += [Case(small, AS_IT_IS, "none", 256)]
    found += [Case(larger, form, None, 512, threads) for form in FORMS for threads in (1, 2)]
    found += [Case(experts, form, None, 128) for form in FORMS]
    return found + [Case(experts, AS_IT_IS, kv, 4096, 2) for kv in ("f32", "bf16", "int8")]


def measure(case: Case, folder: Path) -> tuple[list[str], bool]:
    """A row of the table, and whether both are within their bars."""
    model = load_any(case.model)
    forecast = forecast_schemes_memory(
        model, schemes=(case.form,), prompt_tokens=case.tokens - OUTPUT, output_tokens=OUTPUT, kv=case.kv,
        threads=case.threads,
    )[case.form]  # fmt: skip
    found = peak_memory(
        _built(case, folder), prompt_tokens=case.tokens - OUTPUT, output_tokens=OUTPUT,
        options=EngineOptions(kv_cache=case.kv, threads=case.threads),
    )  # fmt: skip
    engine, counted = forecast.engine.total_bytes, float(found.conditions["engine_memory_bytes"])
    peak, real = forecast.process.peak_bytes, float(found.value or 0)
    well = abs(engine - counted) <= ENGINE_ERROR * counted and abs(peak - real) <= PEAK_ERROR * real + PEAK_ERROR_BYTES
    row = [
        case.model.name, case.form, forecast.engine.kv_cache, f"{case.tokens:,}", str(case.threads), _mb(engine),
        _mb(counted), f"{engine / counted - 1:+.2%}", _mb(peak), _mb(real),
        f"{(peak - real) / 1e6:+.1f} MB ({peak / real - 1:+.1%})", "" if well else "OUTSIDE",
    ]  # fmt: skip
    return row, well


def _built(case: Case, folder: Path) -> Path:
    """The model in its form as something to open: itself, or an artifact of random weights, made once."""
    if case.form == AS_IT_IS:
        return case.model
    place = folder / f"{case.model.name}-{case.form}"
    if not place.exists():
        recipe = scheme_to_recipe(case.form)
        write_artifact(cost_twin(load_any(case.model), recipe), place, recipe)
    return place


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="the smallest models alone: a minute")
    parser.add_argument("--model", type=Path, default=HEARTH, help="the small real model")
    options = parser.parse_args()
    outside = 0
    with tempfile.TemporaryDirectory() as temporary:
        experts = Path(temporary) / "64-experts"
        experts.mkdir()
        (experts / "config.json").write_text(json.dumps(EXPERTS), encoding="utf-8")
        print(f"| {' | '.join(HEADERS)} |\n|{'---|' * len(HEADERS)}", flush=True)
        for case in cases(options.model, experts, quick=options.quick):
            row, well = measure(case, Path(temporary))
            outside += not well
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\n{outside} outside {ENGINE_ERROR:.0%} of the engine or {PEAK_ERROR:.0%} + {PEAK_ERROR_BYTES / 1e6:.0f} MB")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())

"""The precision ladder of one model: what each format costs, and what it loses, on text not calibrated on.

For every scheme: build time, bytes, memory, rates (interleaved in one run), perplexity with its 95%
interval, KL and agreement against the f32 reference, and the largest logit difference between the
native engine and the torch engine that imitates the same rounding. Beside the last stands how far the
same torch engine moves when its own embedding is perturbed by one part in a million: int8 activations
flip codes at rounding boundaries, and a difference of that size is noise, not an error.

    python benchmarks/ladder.py examples/models/hearth-7m --calibrate train.txt.xz --data valid.txt

Leaves out the search; `trilemma optimize` chooses among such rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from trilemma.formats.artifact import load_any
from trilemma.measure.compare import compare
from trilemma.measure.quality.evaluate import choose_context, read_token_set
from trilemma.model.model import Model
from trilemma.runtime import EngineOptions, open_engine
from trilemma.techniques.apply import compress

SCHEMES = (
    "f32,bf16,W8A8,W8A8-g32,W8A16,W4A8-g128,W4A8-g128-gptq,W4A16-g128-gptq,W4A8-g32,W4A8-g32-gptq,"
    "W4A8-g32-asym-gptq,W4A8-g32-gptq-e4"
)


def engine_difference(model: Model, tokens: np.ndarray) -> tuple[float, float]:
    """(largest native - torch logit difference, the same of torch against torch nudged by 1e-6)."""
    options = EngineOptions(kv_cache="f32")
    native = open_engine(model, options=options)
    ours = native.logits(tokens)
    native.close()
    reference = open_engine(model, runtime="torch", options=options)
    theirs = reference.logits(tokens)
    reference.close()
    noise = np.random.default_rng(0).standard_normal(model.config.dim).astype(np.float32)
    name = "layers.0.attention_norm.weight"
    nudged_model = model.with_tensors({name: model.tensor(name) * (1 + 1e-6 * noise)})
    nudged = open_engine(nudged_model, runtime="torch", options=options)
    moved = nudged.logits(tokens)
    nudged.close()
    return float(np.abs(ours - theirs).max()), float(np.abs(moved - theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prepare", default="book", choices=["book", "none"])
    parser.add_argument("--prepare-calibrate", default="none", choices=["book", "none"])
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--tokens", type=int, default=30720)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    names = options.schemes.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        built, build_s = {"unmodified": options.model}, {"unmodified": 0.0}
        for name in names:
            started = time.perf_counter()
            how = options.prepare_calibrate
            compress(options.model, Path(scratch) / name, scheme=name, data=[options.calibrate], prepare=how)
            built[name], build_s[name] = Path(scratch) / name, time.perf_counter() - started
        result = compare(built, [options.data], context=options.context, max_tokens=options.tokens,
                         prepare=options.prepare, prompt_tokens=384, output_tokens=64,
                         repetitions=options.repetitions)  # fmt: skip
        first = load_any(options.model)
        tokens = np.concatenate(
            read_token_set(first, [options.data], choose_context(first, 128), 128, options.prepare).windows
        )[:128]
        differences = {name: engine_difference(load_any(path), tokens) for name, path in built.items()}
    print(
        "| scheme | build s | weights MB | engine MB | prefill tok/s | decode tok/s | tpot vs unmodified "
        "| perplexity (95%) | ppl increase | KL mean (95%) | agreement | native - torch | noise floor |"
    )
    print("|" + "---|" * 13)
    for row in result.rows:
        m, extra = row.measurements, differences[row.name]
        ppl, kl, rise = m["perplexity"], m["kl_mean"], m["ppl_increase"]
        print(
            f"| {row.name} | {build_s[row.name]:.1f} | {m['weights_bytes'].value / 1e6:.2f} "
            f"| {m['engine_memory_bytes'].value / 1e6:.2f} | {m['prefill_tokens_per_s'].value:.0f} "
            f"| {m['decode_tokens_per_s'].value:.0f} | {row.relative['tpot_s'][0]:.2f} "
            f"| {ppl.value:.2f} ({ppl.ci95[0]:.2f} to {ppl.ci95[1]:.2f}) | {rise.value:+.2%} "
            f"| {kl.value:.2e} ({kl.ci95[0]:.2e} to {kl.ci95[1]:.2e}) | {m['top1_agreement'].value:.2%} "
            f"| {extra[0]:.1e} | {extra[1]:.1e} |"
        )
        if options.json:
            record = {"model": options.model.name, "scheme": row.name, "build_s": build_s[row.name],
                      "native_torch_difference": extra[0], "noise_floor": extra[1],
                      "measurements": {k: v.model_dump(mode="json") for k, v in m.items()}}  # fmt: skip
            with options.json.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
    for note in result.notes:
        print(note)


if __name__ == "__main__":
    main()

"""The main job from end to end, as a user types it; `make demo` runs this. Leaves its evidence in a folder.

    python examples/demo.py out/demo

Two panels that are never mixed: **quality**, the shipped model with its real weights and real text, and
**cost**, the shapes of four published models with random weights. A model of 14 MB lies in the cache and
can not show what memory costs; random weights can not show what quality costs.
"""

from __future__ import annotations

import html
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))  # so that commands and reports show short paths
MODEL = HERE / "models" / "hearth-7m"
TEXTS = HERE / "texts" / "children.txt"
SHAPES = ("SmolLM2-135M", "SmolLM2-360M", "Qwen2.5-0.5B", "Llama-3.2-1B")
LIMITS = ("weights<=50%", "tpot<=90%", "ppl_increase<=2%")
SCHEMES = "bf16,W8A8,W4A8-g32"
SEARCH_TIME = "90s"


def main() -> None:
    begun = time.perf_counter()
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    output.mkdir(parents=True, exist_ok=True)
    chosen = quality_panel(output)
    cost_panel(output)
    write_index(output, chosen)
    say(f"\nDone in {time.perf_counter() - begun:.0f} s. Open {output / 'index.html'}")


def quality_panel(output: Path) -> Path:
    """Choose, run, check, compare and export on the shipped model."""
    say("\n=== Quality: the shipped model, real weights, text it has not seen ===")
    chosen = output / "hearth-small"
    shutil.rmtree(chosen, ignore_errors=True)
    trilemma("inspect", MODEL)
    limits = [part for limit in LIMITS for part in ("--limit", limit)]
    trilemma("optimize", MODEL, "-o", chosen, "--data", TEXTS, *limits, "--time", SEARCH_TIME, accept=(0, 3, 4))
    if not chosen.is_dir():
        sys.exit("error: nothing was feasible on this machine; the table above says which limit blocks")
    trilemma("run", chosen, "Once upon a time", "--max-tokens", "60")
    trilemma("check", chosen, accept=(0, 3, 4))
    (output / "hearth-small.gguf").unlink(missing_ok=True)
    trilemma("export", chosen, "--to", "gguf", "-o", output / "hearth-small.gguf")
    return chosen


def cost_panel(output: Path) -> None:
    """What larger models cost on this machine: shapes of published models, random weights, no quality."""
    say("\n=== Cost: shapes of published models, random weights, no quality is claimed ===")
    shapes = [HERE / "shapes" / name for name in SHAPES]
    lengths = ("--prompt", "64", "--output", "16", "--repetitions", "3")
    trilemma("bench", *shapes, "--scheme", SCHEMES, *lengths, "--save", output / "cost.json")
    trilemma("report", output / "cost.json", "-o", output / "cost.html")


def write_index(output: Path, chosen: Path) -> None:
    """One page that leads to both panels and keeps them apart."""
    report = json.loads((chosen / "report.json").read_text(encoding="utf-8"))
    decision = html.escape(report["decision"]["sentence"])
    verdicts = "".join(
        f"<li><code>{html.escape(each['limit']['text'])}</code>: <b>{each['outcome']}</b></li>"
        for each in report["verdicts"]
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Trilemma: the demo</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem }}
section {{ border: 1px solid #8888; border-radius: 8px; padding: 0 1.2rem 1rem; margin: 1.5rem 0 }}</style></head><body>
<h1>Trilemma: the demo</h1>
<section><h2>Quality</h2><p><b>Real weights</b>: the shipped model on text that it has not seen.</p>
<p>{decision}</p><ul>{verdicts}</ul>
<p><a href="{chosen.name}/report.html">The report</a></p></section>
<section><h2>Cost</h2><p><b>Random weights</b> in the shapes of {", ".join(SHAPES)}: time and memory on this machine,
and nothing about quality.</p><p><a href="cost.html">The table</a></p></section>
</body></html>
"""
    (output / "index.html").write_text(page, encoding="utf-8")


def trilemma(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> None:
    """Run a command as the user would, after showing it."""
    words = [str(argument) for argument in arguments]
    say(f"\n$ trilemma {shlex.join(words)}")
    done = subprocess.run([sys.executable, "-m", "trilemma", *words], check=False)
    if done.returncode not in accept:
        sys.exit(done.returncode)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()

"""An OptimizeReport as one HTML page: no scripts, no network, readable in the dark and on paper.

The template lays out; this file only gathers. Nothing here computes a verdict: that was done when the
numbers were taken.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import FunctionLoader, StrictUndefined
from markupsafe import Markup

from trilemma.core.metric import METRICS
from trilemma.core.results import Answer, OptimizeReport
from trilemma.core.trial import Trial
from trilemma.core.verdict import Verdict
from trilemma.report import charts, numbers

TRIAL_METRICS = (
    "weights_bytes", "engine_memory_bytes", "tpot_s", "ttft_s", "prefill_tokens_per_s",
    "ppl_increase", "kl_mean", "top1_agreement", "energy_j_per_output_token",
    "battery_h", "build_s", "build_energy_j",
)  # fmt: skip
SHOWN_ANSWERS = 6


def render(report: OptimizeReport) -> str:
    """The page of evidence for one run.

    Args:
        report: as read from report.json (`trilemma.core.results.read_report`).

    Returns:
        A whole HTML document that refers to nothing outside itself.
    """
    chosen = report.confirmed
    trials = _all_trials(report)
    front_of = chosen.name if chosen is not None else report.decision.chosen
    context = {
        "report": report,
        "chosen": chosen,
        "tiles": _tiles(report, chosen) if chosen is not None else [],
        "limits": [_limit_row(found) for found in report.verdicts],
        "scatters": [
            charts.front_scatter(trials, report.front, front_of, report.baseline.name, metric)
            for metric in ("weights_bytes", "tpot_s")
        ],
        "answers": [_answer_row(answer) for answer in report.answers[:SHOWN_ANSWERS]],
        "equal_answers": sum(answer.first_difference is None for answer in report.answers),
        "bytes_chart": charts.stacked_bytes(report.bytes_by_role),
        "rates": _weight_rates(report),
        "products": _products(report),
        "alternatives": _alternatives(report),
        "columns": [m for m in TRIAL_METRICS if any(m in t.measurements for t in trials)],
        "trials": trials,
        "measured": sum(trial.status == "measured" for trial in report.trials),
        "recipe_yaml": chosen.recipe.to_yaml() if chosen is not None else "",
        "runtime_facts": environment_facts(report),
    }
    return templates().get_template("page.html.j2").render(context)


@cache
def templates() -> Templates:
    folder = files("trilemma.report") / "templates"
    loader = FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    found = Templates(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.globals.update(numbers=numbers, METRICS=METRICS, style=Markup((folder / "style.css").read_text("utf-8")))
    return found


def environment_facts(report: OptimizeReport) -> list[tuple[str, str]]:
    here = report.environment
    facts = [
        ("Processor", here.cpu),
        ("Cores, threads used", f"{here.cores}, {here.threads or here.cores}"),
        ("Instruction set", here.isa or "not stated"),
        ("Memory", numbers.format_quantity(here.memory_bytes, "bytes")),
        ("System", here.system),
        ("Python", here.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in here.packages.items())),
        ("Runtime", report.runtime),
        ("Model hash", report.model_hash),
        ("Recipe hash", here.recipe_hash),
        ("Seed", str(here.seed)),
    ]
    return [(name, value) for name, value in facts if value]


def _all_trials(report: OptimizeReport) -> list[Trial]:
    names = {report.baseline.name}
    rest = [trial for trial in report.trials if trial.name not in names]
    return [report.baseline, *rest]


def _alternatives(report: OptimizeReport) -> list[tuple[str, str]]:
    """(trial, 'the smallest and the safest'), each trial once."""
    kinds: dict[str, list[str]] = {}
    for kind, name in report.decision.alternatives.items():
        kinds.setdefault(name, []).append(f"the {kind}")
    return [(name, " and ".join(those)) for name, those in kinds.items()]


def _products(report: OptimizeReport) -> str:
    """Which kernels multiply: 'int4-g32 weights with int8-g32 inputs, on avx512_vnni'."""
    steps = [] if report.confirmed is None else [step.settings for step in report.confirmed.recipe.steps]
    settings = next((found for found in steps if "weights" in found and "activations" in found), None)
    if settings is None:
        return ""
    where = f", on {report.environment.isa}" if report.environment.isa else ""
    return f"{settings['weights']} weights with {settings['activations']} inputs{where}"


def _tiles(report: OptimizeReport, chosen: Trial) -> list[dict[str, str]]:
    """Before and after of what people ask first."""
    tiles = []
    for metric in (
        "weights_bytes",
        "tpot_s",
        "peak_memory_bytes",
        "energy_j_per_output_token",
        "ppl_increase",
        "kl_mean",
    ):
        after = chosen.measurements.get(metric)
        if after is None or after.value is None:
            continue
        before = chosen.paired_baseline.get(metric) or report.baseline.measurements.get(metric)
        tile = {
            "label": numbers.label(metric), "value": numbers.show_value(after),
            "detail": numbers.show_interval(after), "source": numbers.show_source(after),
        }  # fmt: skip
        if metric not in ("ppl_increase", "kl_mean") and before is not None and before.value:
            share = numbers.format_percent(numbers.ratio(after, before))
            tile["detail"] = f"{share} of {numbers.show_value(before)}"
        tiles.append(tile)
    return tiles


def _limit_row(found: Verdict) -> dict[str, Any]:
    return {
        "verdict": found,
        "label": numbers.label(found.limit.metric),
        "threshold": numbers.show_threshold(found),
        "value": numbers.show_value(found.measurement),
        "source": numbers.show_source(found.measurement),
        "bar": charts.limit_bar(found),
    }


def _answer_row(answer: Answer) -> dict[str, Any]:
    """Splits both continuations where their texts part."""
    same = 0
    for ours, theirs in zip(answer.original, answer.chosen, strict=False):
        if ours != theirs:
            break
        same += 1
    if answer.first_difference is not None and 0 < same < max(len(answer.original), len(answer.chosen)):
        same = max(answer.original.rfind(" ", 0, same + 1) + 1, 0)  # whole words are easier to compare
    return {
        "prompt": answer.prompt,
        "same": answer.original[:same],
        "original": answer.original[same:],
        "chosen": answer.chosen[same:],
        "first_difference": answer.first_difference,
    }


def _weight_rates(report: OptimizeReport) -> list[tuple[str, str]]:
    """Weight bytes read per second while decoding: what memory bandwidth the model draws."""
    if report.confirmed is None:
        return []
    rows = []
    before = report.confirmed.paired_baseline.get("tpot_s") or report.baseline.measurements.get("tpot_s")
    pairs = (
        ("unmodified", report.baseline.value("weights_bytes"), None if before is None else before.value),
        ("chosen", report.confirmed.value("weights_bytes"), report.confirmed.value("tpot_s")),
    )
    for name, size, seconds in pairs:
        if size and seconds:
            rows.append((name, f"{numbers.significant(size / seconds / 1e9)} GB/s"))
    return rows

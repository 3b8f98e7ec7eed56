"""Does speculation pay? Plain and speculative decoding of the same prompts, interleaved, and checked to be equal.

The gain is measured, never taken from the formula; the formula's parts (acceptance, cost of a drafted
token, cost of a wider pass) are stated beside it, because they say why.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean, median

from trilemma.core.errors import EngineError, InputError
from trilemma.core.quantity import format_quantity
from trilemma.core.record import Record
from trilemma.measure.stats import paired_ratio
from trilemma.measure.timing.interleave import Progress, interleave
from trilemma.runtime.draft_length import expected_speedup
from trilemma.runtime.engine import SamplingSettings, settle
from trilemma.runtime.speculation_figures import SpeculationFigures
from trilemma.runtime.speculative import SpeculativeEngine


class SpeculationReport(Record):
    """Measured gain of speculation over plain decoding of the same answers.

    speedup: plain seconds over speculative seconds of whole requests, paired by round, with its 95% interval.
    acceptance_rate (a), draft_cost_ratio (c), pass_cost_ratio (v), drafted_per_pass (g): means over all rounds;
    formula_speedup is (1-a^(g+1))/(1-a)/(g c + 1), expected_speedup has v in place of 1.
    """

    speedup: float
    speedup_ci95: tuple[float, float] | None
    rounds: int
    output_tokens: int
    plain_s: float
    speculative_s: float
    acceptance_rate: float | None
    tokens_per_pass: float | None
    drafted_per_pass: float
    draft_cost_ratio: float | None
    pass_cost_ratio: float | None
    formula_speedup: float | None
    expected_speedup: float | None
    noisy: str | None

    @property
    def outcome(self) -> str:
        """'gain', 'loss', or 'no clear difference' where the interval holds 1."""
        if self.speedup_ci95 is None or self.speedup_ci95[0] <= 1 <= self.speedup_ci95[1]:
            return "no clear difference"
        return "gain" if self.speedup > 1 else "loss"

    def summary(self) -> str:
        """One line: 'measured against plain decoding: x1.42 [1.38, 1.47], a gain; ...'."""
        span = "" if self.speedup_ci95 is None else " [{:.2f}, {:.2f}]".format(*self.speedup_ci95)
        text = f"measured against plain decoding ({self.rounds} paired rounds, equal tokens): x{self.speedup:.2f}{span}"
        seconds = (
            f"{format_quantity(self.speculative_s, 's')} instead of {format_quantity(self.plain_s, 's')} an answer"
        )
        text += f", {'a ' * (self.outcome != 'no clear difference')}{self.outcome}; {seconds}"
        if self.expected_speedup is not None and self.formula_speedup is not None:
            text += (
                f"; with {self.drafted_per_pass:.1f} drafted tokens a pass x{self.expected_speedup:.2f} was expected "
                f"(x{self.formula_speedup:.2f} if wide passes were free)"
            )
        return text + (f"; noisy: {self.noisy}" if self.noisy else "")


def measure_speculation(
    engine: SpeculativeEngine,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings | None = None,
    *,
    rounds: int = 9,
    time_limit_s: float = 60.0,
    progress: Progress | None = None,
) -> SpeculationReport:
    """Answer all prompts with and without speculation, round after round.

    Args:
        engine: target and draft; its target decodes plainly.
        prompts: token ids of real requests: what can be guessed depends on them.
        rounds: after a discarded one, interleaved; fewer when `time_limit_s` is over, at least three.

    Raises:
        InputError: no prompts, or one that does not fit.
        EngineError: speculation gave other tokens, which is a bug.
    """
    if not prompts:
        raise InputError("Measuring speculation needs at least one prompt.")
    chosen = settings or SamplingSettings()
    answers: dict[int, list[int]] = {}
    seen: list[SpeculationFigures] = []
    steps: list[float] = []  # gaps between the tokens of plain decoding

    def plain() -> dict[str, float]:
        seconds = 0.0
        for index, prompt in enumerate(prompts):
            done = engine.target.generate(prompt, chosen)
            answers[index] = done.tokens
            times = done.token_times_s
            seconds += times[-1] if times else 0.0
            steps.extend(later - earlier for earlier, later in itertools.pairwise(times))
        return {"request_s": seconds}

    def speculative() -> dict[str, float]:
        seconds = 0.0
        for index, prompt in enumerate(prompts):
            done = engine.generate(prompt, chosen)
            if done.tokens != answers[index]:
                raise EngineError(f"Speculation changed the answer to prompt {index}. This is a bug; please report it.")
            seconds += done.token_times_s[-1] if done.token_times_s else 0.0
            seen.append(done.figures)
        return {"request_s": seconds}

    settle(engine)
    found = interleave(
        {"plain": plain, "speculative": speculative}, threads=engine.threads, rounds=rounds,
        time_limit_s=time_limit_s, progress=progress, what="plain and speculative",
    )  # fmt: skip
    tokens = sum(len(answer) for answer in answers.values())
    if not tokens:
        raise InputError("The model ends its answer at once, so there is nothing to time. Give another prompt.")
    ours, theirs = found.of("speculative", "request_s"), found.of("plain", "request_s")
    gain = paired_ratio(list(ours), list(theirs))
    return SpeculationReport(
        speedup=gain.value, speedup_ci95=gain.ci95, rounds=len(ours), output_tokens=tokens,
        plain_s=median(theirs) / len(prompts), speculative_s=median(ours) / len(prompts), noisy=found.noisy,
        drafted_per_pass=_drafted_per_pass(seen), **_parts(seen, fmean(steps) if steps else None),
    )  # fmt: skip


def _parts(seen: Sequence[SpeculationFigures], step_s: float | None) -> dict[str, float | None]:
    """a, c and v over all requests, and what the formulas make of them."""
    accepted, refused = sum(one.accepted for one in seen), sum(one.refused for one in seen)
    passes = sum(one.passes for one in seen)
    outputs = sum(one.output_tokens - 1 for one in seen)
    parts: dict[str, float | None] = {
        "acceptance_rate": accepted / (accepted + refused) if accepted + refused else None,
        "tokens_per_pass": outputs / passes if passes else None,
        "draft_cost_ratio": None, "pass_cost_ratio": None, "formula_speedup": None, "expected_speedup": None,
    }  # fmt: skip
    rate = parts["acceptance_rate"]
    if step_s is None or rate is None:
        return parts
    wide = [seconds for one in seen for width, times in one.pass_s.items() if width > 1 for seconds in times]
    cost = sum(one.draft_s for one in seen) / sum(one.drafted for one in seen) / step_s
    width_cost = fmean(wide) / step_s
    whole = round(_drafted_per_pass(seen))
    return parts | {
        "draft_cost_ratio": cost, "pass_cost_ratio": width_cost,
        "formula_speedup": expected_speedup(rate, whole, cost),
        "expected_speedup": expected_speedup(rate, whole, cost, width_cost),
    }  # fmt: skip


def _drafted_per_pass(seen: Sequence[SpeculationFigures]) -> float:
    """g: proposals of a pass that had any."""
    drafting = sum(one.passes - one.plain_passes for one in seen)
    return sum(one.drafted for one in seen) / drafting if drafting else 0.0

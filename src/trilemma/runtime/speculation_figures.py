"""What speculation did in a request, in figures: passes, acceptance, and what drafting and wide passes cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from trilemma.core.quantity import format_percent, significant
from trilemma.runtime.engine import Generation


@dataclass
class SpeculationFigures:
    """What speculation did in one request; seconds are wall time.

    passes: of the target after the prompt; plain_passes: those without a proposal; drafted, accepted:
    proposed tokens and those kept; refused: passes that ended at a refused proposal; draft_s: time spent
    drafting; pass_s: width of a pass (pending token + proposals) -> its times; total_s: the whole request.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    refused: int = 0
    output_tokens: int = 0
    draft_s: float = 0.0
    draft_token_s: list[float] = field(default_factory=list)
    pass_s: dict[int, list[float]] = field(default_factory=dict)
    prompt_s: float = 0.0
    total_s: float = 0.0

    @property
    def plain_passes(self) -> int:
        return len(self.pass_s.get(1, ()))

    @property
    def acceptance_rate(self) -> float | None:
        """a: share of the proposals that were kept among those that the target looked at in vain or kept."""
        tried = self.accepted + self.refused
        return self.accepted / tried if tried else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Output tokens after the first, over passes of the target."""
        return (self.output_tokens - 1) / self.passes if self.passes else None

    @property
    def draft_cost_ratio(self) -> float | None:
        """c: median time of a drafted token over that of a plain pass; None where either is missing."""
        if not self.draft_token_s or not self.plain_passes:
            return None
        return median(self.draft_token_s) / median(self.pass_s[1])

    @property
    def pass_cost_ratios(self) -> dict[int, float]:
        """v(w): median time of a pass over w tokens over that of a plain one; empty without a plain one."""
        if not self.plain_passes:
            return {}
        plain = median(self.pass_s[1])
        return {width: median(times) / plain for width, times in sorted(self.pass_s.items())}

    @property
    def overhead_per_pass_s(self) -> float | None:
        """Time a pass outside draft and target: choosing, bookkeeping, `on_token`."""
        if not self.passes:
            return None
        inside = self.draft_s + self.prompt_s + sum(sum(times) for times in self.pass_s.values())
        return max(0.0, self.total_s - inside) / self.passes

    def record(self) -> dict[str, object]:
        """Everything but raw times, for JSON."""
        return {
            "target_passes": self.passes, "plain_passes": self.plain_passes, "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted, "acceptance_rate": self.acceptance_rate,
            "tokens_per_pass": self.tokens_per_pass, "draft_cost_ratio": self.draft_cost_ratio,
            "pass_cost_ratios": self.pass_cost_ratios, "draft_s": self.draft_s,
            "overhead_per_pass_s": self.overhead_per_pass_s,
        }  # fmt: skip

    def summary(self) -> str:
        """One line: '38 passes, 11 of them plain; 61% of 70 drafted tokens kept, 1.9 tokens a pass, ...'."""
        parts = [f"{self.passes} passes of the target, {self.plain_passes} of them plain"]
        if self.drafted:
            rate = self.acceptance_rate or 0.0
            parts.append(f"{self.accepted} of {self.drafted} drafted tokens kept (acceptance {format_percent(rate)})")
        else:
            parts.append("nothing was drafted")
        if self.tokens_per_pass is not None:
            parts.append(f"{significant(self.tokens_per_pass)} tokens a pass")
        if self.draft_cost_ratio is not None:
            parts.append(f"a drafted token costs {significant(self.draft_cost_ratio)} of a plain pass")
        widest = max(self.pass_cost_ratios, default=1)
        if widest > 1:
            parts.append(f"a pass over {widest} tokens {significant(self.pass_cost_ratios[widest])}")
        return ", ".join(parts)


@dataclass(frozen=True)
class SpeculativeGeneration(Generation):
    """A generation, and what speculation did for it."""

    figures: SpeculationFigures = field(default_factory=SpeculationFigures)

"""Speculative decoding: several tokens a pass of the target, and the same text as without it.

A draft proposes tokens, the target looks at all of them in one pass and keeps those that it would have
chosen itself (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). The native
engine's logits do not depend on how tokens are split over passes, so greedy output is **equal token for
token** to plain decoding. So is sampled output: a draw depends on seed and position alone
(`sampling.py`), and a proposal is kept when it is what that draw picks. This couples draft and target by
shared randomness (Daliri, Musco, Suresh 2024, arXiv:2408.07978) where Leviathan's rejection sampling
keeps the distribution only: a few proposals fewer are kept, and the same seed gives the same text with
any draft or none.

Left out: trees of proposals, several sequences at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import InputError
from trilemma.core.quantity import format_percent, significant
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.draft_length import DraftLength
from trilemma.runtime.drafts import Draft, LookupDraft, ModelDraft
from trilemma.runtime.engine import EngineMemory, EngineOptions, Generation, SamplingSettings
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step
from trilemma.runtime.output import Output
from trilemma.runtime.sampling import choose
from trilemma.runtime.text_model import TextModel, tokenizer_of

PADDING = 0.01  # share by which checkpoints of one family pad their vocabularies differently


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


class SpeculativeEngine:
    """The Engine protocol over a target and a draft; `generate` speculates, all else is the target's.

    Args:
        target: an open native engine; closed with this one.
        draft: where proposals come from; closed with this one.
        draft_tokens: proposals a pass; None chooses them from measured acceptance and cost, and stops
            drafting where that loses (`draft_length.py`).

    Attributes:
        last: the latest `SpeculativeGeneration`.
    """

    name = "native, speculative"

    def __init__(self, target: NativeEngine, draft: Draft, draft_tokens: int | None = None) -> None:
        if draft_tokens is not None and draft_tokens < 1:
            raise InputError(f"draft_tokens is {draft_tokens}; it must be at least 1, or left out to be chosen.")
        self.target, self.draft, self.draft_tokens = target, draft, draft_tokens
        self.config, self.threads, self.isa = target.config, target.threads, target.isa
        self.kv_cache, self.max_context = target.kv_cache, target.max_context
        self.last: SpeculativeGeneration | None = None
        self._length = DraftLength(draft_tokens)
        self._batch: SequenceBatch = target.open_sequences(1)
        self._sequence = self._batch.create()

    def memory(self) -> EngineMemory:
        """Bytes of target and draft together."""
        held = [self._batch.memory()]
        if isinstance(self.draft, ModelDraft):
            held.append(self.draft.engine.memory())
        return EngineMemory(
            sum(one.weights_bytes for one in held), sum(one.kv_bytes for one in held),
            sum(one.scratch_bytes for one in held),
        )  # fmt: skip

    def logits(self, tokens: NDArray[np.int32] | Sequence[int], *, last_only: bool = False) -> NDArray[np.float32]:
        """The target's logits."""
        return self.target.logits(tokens, last_only=last_only)

    def generate(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> SpeculativeGeneration:
        """Continue `prompt`: the tokens that the target alone would give, with the figures of how."""
        output = Output(prompt, settings, self.config, self.max_context, on_token)
        figures = SpeculationFigures()
        self.draft.begin()
        self._batch.truncate(self._sequence, 0)
        begun = time.perf_counter()
        logits = self._batch.forward([Step(self._sequence, output.seen)])[0]
        figures.prompt_s = time.perf_counter() - begun
        going = output.push(choose(logits[0], output.seen, settings))
        while going:
            going = self._pass(output, settings, figures)
        figures.total_s = time.perf_counter() - begun
        figures.output_tokens = output.count
        done = output.generation()
        self.last = SpeculativeGeneration(
            done.tokens, done.finish_reason, done.prompt_tokens, done.token_times_s, figures
        )
        return self.last

    def close(self) -> None:
        self.draft.close()
        self.target.close()

    def _pass(self, output: Output, settings: SamplingSettings, figures: SpeculationFigures) -> bool:
        """Propose, look at all proposals in one pass, keep what is right and the token after it."""
        began = time.perf_counter()
        wanted = self._length.choose(output.most - 1)  # the pass gives one token by itself
        proposed = self.draft.propose(output.seen, wanted, settings) if wanted else []
        drafted = time.perf_counter()
        logits = self._batch.forward([Step(self._sequence, [output.seen[-1], *proposed], "all")])[0]
        ended = time.perf_counter()
        going, accepted = _keep(logits, proposed, output, settings)
        self._batch.truncate(self._sequence, len(output.seen) - 1)
        figures.passes += 1
        figures.drafted += len(proposed)
        figures.accepted += accepted
        figures.refused += going and accepted < len(proposed)
        figures.draft_s += drafted - began
        figures.pass_s.setdefault(len(proposed) + 1, []).append(ended - drafted)
        if proposed:
            figures.draft_token_s.append((drafted - began) / len(proposed))
        self._length.saw(len(proposed), accepted, drafted - began, ended - drafted)
        return going


def _keep(
    logits: NDArray[np.float32], proposed: list[int], output: Output, settings: SamplingSettings
) -> tuple[bool, int]:
    """Choose token after token while the proposals are what is chosen: (going on, accepted proposals)."""
    for accepted, row in enumerate(logits):
        token = choose(row, output.seen, settings)
        if not output.push(token):
            kept = accepted < len(proposed) and proposed[accepted] == token
            return False, accepted + kept
        if accepted == len(proposed) or proposed[accepted] != token:
            return True, accepted
    raise AssertionError("a pass has one more row than proposals")


def speculate(
    target: NativeEngine,
    draft: NativeEngine | Draft | None,
    prompt: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    draft_tokens: int | None = None,
    on_token: Callable[[int], bool | None] | None = None,
) -> SpeculativeGeneration:
    """Continue `prompt` with a draft; the tokens are those of `target.generate`.

    Args:
        target, draft: open engines over the same tokens, which stay open; None looks tokens up in the text.
        prompt: token ids.
        draft_tokens: proposals a pass; None chooses and adapts them.

    Raises:
        InputError: as `Engine.generate`; or a vocabulary of another size.
    """
    proposer = LookupDraft() if draft is None else draft
    if isinstance(proposer, NativeEngine):
        proposer = model_draft(target, proposer)
    return SpeculativeEngine(target, proposer, draft_tokens).generate(prompt, settings or SamplingSettings(), on_token)


def model_draft(target: NativeEngine, draft: NativeEngine, name: str = "draft model") -> ModelDraft:
    """A draft from an engine of the same vocabulary size. Which tokens the ids mean is the tokenizers' matter.

    Raises:
        InputError: the sizes differ by more than the padding of some checkpoints.
    """
    ours, theirs = target.config.vocab_size, draft.config.vocab_size
    if abs(ours - theirs) > PADDING * ours:
        raise InputError(
            f"The draft has {theirs} token ids, the target {ours}: they do not read the same tokens. "
            "Choose a draft of the same family, or one made from the target."
        )
    return ModelDraft(draft, ours, target.max_context, name)


def open_speculative(
    model: Model | str | Path,
    draft: Model | str | Path | None = None,
    *,
    draft_tokens: int | None = None,
    options: EngineOptions | None = None,
) -> TextModel:
    """Open a target and a draft model (None: prompt look-up) on the native engine, as one text model.

    Its `engine` is a SpeculativeEngine, whose `last` holds the figures of the latest answer.

    Raises:
        CheckpointError: no such model, or it has no tokenizer.
        InputError: the two have different tokenizers.
    """
    from trilemma.formats.artifact import load_any

    loaded = model if isinstance(model, Model) else load_any(model)
    tokenizer, path = tokenizer_of(loaded)
    proposer: Draft = LookupDraft()
    opened: list[NativeEngine] = []
    try:
        opened.append(NativeEngine(loaded, options))
        if draft is not None:
            smaller = draft if isinstance(draft, Model) else load_any(draft)
            require_same_tokens(tokenizer, path, *tokenizer_of(smaller))
            shorter = (options or EngineOptions()).model_copy(update={"max_context": None, "kv_cache": None})
            opened.append(NativeEngine(smaller, shorter))
            proposer = model_draft(opened[0], opened[1], str(smaller.path))
        return TextModel(SpeculativeEngine(opened[0], proposer, draft_tokens), tokenizer, path)
    except BaseException:
        for engine in opened:
            engine.close()
        raise


def require_same_tokens(ours: Tokenizer, our_path: Path, theirs: Tokenizer, their_path: Path) -> None:
    """Raise InputError unless both read and write the same token ids."""
    why = ours.difference(theirs)
    if why is not None:
        raise InputError(
            f"{their_path} has another tokenizer than {our_path}: {why}. Both models must use the same token ids; "
            "choose one of the same family, or one made from the other (compress, distill)."
        )

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
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import InputError
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime.draft_length import DraftLength
from trilemma.runtime.drafts import Draft, LookupDraft, ModelDraft
from trilemma.runtime.engine import EngineMemory, EngineOptions, SamplingSettings, settle
from trilemma.runtime.native import NativeEngine, SequenceBatch, Step
from trilemma.runtime.output import Output
from trilemma.runtime.requests import checked_tokens
from trilemma.runtime.sampling import choose
from trilemma.runtime.speculation_figures import SpeculationFigures, SpeculativeGeneration
from trilemma.runtime.text_model import TextModel, tokenizer_of

PADDING = 0.01  # share by which checkpoints of one family pad their vocabularies differently


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
        checked_tokens(output.seen, self.config.vocab_size)
        self.draft.begin()
        self._batch.release(self._sequence)
        begun = time.perf_counter()
        self._sequence, output.reused = self._batch.begin(output.seen)
        logits = self._batch.forward([Step(self._sequence, output.seen[output.reused :])])[0]
        figures.prompt_s = time.perf_counter() - begun
        going = output.push(choose(logits[0], output.seen, settings))
        while going:
            going = self._pass(output, settings, figures)
        figures.total_s = time.perf_counter() - begun
        figures.output_tokens = output.count
        done = output.generation()
        self.last = SpeculativeGeneration(
            done.tokens, done.finish_reason, done.prompt_tokens, done.token_times_s, done.reused_tokens, figures
        )
        return self.last

    def close(self) -> None:
        self.draft.close()
        self.target.close()

    def settle(self) -> None:
        settle(self.draft)
        settle(self.target)

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

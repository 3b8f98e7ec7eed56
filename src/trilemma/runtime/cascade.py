"""A small model answers; where it is not confident enough, a large one answers instead.

The decision is made once an answer, by Chow's rule (1970): keep the small model's answer when its own
confidence reaches a threshold. Confidence is read from the probabilities of its tokens, as their
geometric mean ('mean') or their 10% quantile ('p10', which one uncertain passage is enough to lower):
Gupta et al. 2024, "Language model cascades: token-level uncertainty and beyond" (arXiv:2404.10136).

Why whole answers and not tokens: a large model that decides single tokens has to read all the others
too, which is the work of speculation (`speculative.py`), and that is exact. A kept answer costs the large
model nothing; it may as well be elsewhere. The price: nothing can be shown before the decision.

A threshold means something only after calibration on text (`search/cascade.py`); `CascadeRecord`
(`cascade_record.py`) keeps it with what it was measured on. Left out: more than two models, learned routers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.core.errors import EngineError
from trilemma.core.quantity import format_quantity
from trilemma.model.model import Model
from trilemma.runtime.cascade_record import CascadeRule, Signal
from trilemma.runtime.engine import EngineMemory, EngineOptions, Generation, SamplingSettings, settle
from trilemma.runtime.native import NativeEngine, Step
from trilemma.runtime.output import Output
from trilemma.runtime.sampling import choose
from trilemma.runtime.speculative import require_same_tokens
from trilemma.runtime.text_model import TextModel, tokenizer_of

_QUANTILE = 0.1


@dataclass(frozen=True)
class SmallAnswer:
    """The small model's answer (None when it was given up), and the probability of each token it chose.

    A stop token is chosen too, so it counts, though it is not part of the answer.
    """

    generation: Generation | None
    probabilities: list[float]
    seconds: float


@dataclass(frozen=True)
class CascadeGeneration(Generation):
    """An answer, whose it is, and what it took. `confidence` is None when the small model gave up early."""

    by: Literal["small", "large"] = "large"
    confidence: float | None = None
    small_tokens: int = 0
    small_s: float = 0.0
    large_s: float = 0.0

    def summary(self, rule: CascadeRule) -> str:
        """'answered by the small model (confidence 0.61, threshold 0.50), ...'."""
        sure = "given up early" if self.confidence is None else f"confidence {self.confidence:.2f}"
        small, large = format_quantity(self.small_s, "s"), format_quantity(self.large_s, "s")
        whose = f"answered by the {self.by} model ({sure}, threshold {rule.threshold:.2f})"
        return f"{whose}; {small} of the small, {large} of the large model"


def confidence(probabilities: Sequence[float], signal: Signal) -> float:
    """The signal of an answer from its tokens' probabilities; 0 of none."""
    if not probabilities:
        return 0.0
    if signal == "mean":
        return math.exp(sum(map(_log, probabilities)) / len(probabilities))
    return sorted(probabilities)[math.ceil(_QUANTILE * len(probabilities)) - 1]


class CascadeEngine:
    """The Engine protocol over two models; `generate` asks the small one first.

    Args:
        small, large: open native engines over the same token ids; closed with this one.
        rule: signal and threshold.

    Attributes:
        last: the latest `CascadeGeneration`.
    """

    name = "native, cascade"

    def __init__(self, small: NativeEngine, large: NativeEngine, rule: CascadeRule) -> None:
        self.small, self.large, self.rule = small, large, rule
        self.config, self.threads, self.isa = large.config, large.threads, large.isa
        self.kv_cache = large.kv_cache
        self.max_context = min(small.max_context, large.max_context)
        self.last: CascadeGeneration | None = None
        self._batch = small.open_sequences(1)
        self._sequence = self._batch.create()

    def memory(self) -> EngineMemory:
        """Bytes of both models."""
        held = [self._batch.memory(), self.large.memory()]
        return EngineMemory(
            sum(one.weights_bytes for one in held), sum(one.kv_bytes for one in held),
            sum(one.scratch_bytes for one in held),
        )  # fmt: skip

    def logits(self, tokens: NDArray[np.int32] | Sequence[int], *, last_only: bool = False) -> NDArray[np.float32]:
        raise EngineError("A cascade answers with one of two models and has no logits of its own; open one of them.")

    def generate(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> CascadeGeneration:
        """Answer `prompt`. `on_token` sees tokens from the decision on; times are seconds from the request."""
        tried = self.try_small(prompt, settings, give_up=True)
        found = None if tried.generation is None else confidence(tried.probabilities, self.rule.signal)
        count = len(tried.probabilities)
        if found is not None and tried.generation is not None and found >= self.rule.threshold:
            tokens, reason = tried.generation.tokens, tried.generation.finish_reason
            if on_token is not None:
                for shown, token in enumerate(tokens, start=1):
                    if on_token(token) is False:
                        tokens, reason = tokens[:shown], "interrupted"
                        break
            times = [tried.seconds] * len(tokens)  # nothing could be shown before the decision
            self.last = CascadeGeneration(
                tokens, reason, len(prompt), times, by="small", confidence=found, small_tokens=count,
                small_s=tried.seconds,
            )  # fmt: skip
            return self.last
        began = time.perf_counter()
        done = self.large.generate(prompt, settings, on_token)
        seconds = time.perf_counter() - began
        times = [tried.seconds + at for at in done.token_times_s]
        self.last = CascadeGeneration(
            done.tokens, done.finish_reason, done.prompt_tokens, times, by="large", confidence=found,
            small_tokens=count, small_s=tried.seconds, large_s=seconds,
        )  # fmt: skip
        return self.last

    def try_small(self, prompt: Sequence[int], settings: SamplingSettings, *, give_up: bool = False) -> SmallAnswer:
        """The small model's answer with the probability of each token.

        Args:
            give_up: stop as soon as no continuation could reach the threshold; the decision stays the same.
        """
        output = Output(prompt, settings, self.config, self.max_context)
        watch = _Watch(self.rule, output.most) if give_up else None
        self._batch.truncate(self._sequence, 0)
        probabilities: list[float] = []
        began, step, going = time.perf_counter(), output.seen, True
        while going:
            logits = self._batch.forward([Step(self._sequence, step)])[0][0]
            token = choose(logits, output.seen, settings)
            probabilities.append(_probability(logits, token))
            if watch is not None and watch.is_hopeless(probabilities[-1]):
                return SmallAnswer(None, probabilities, time.perf_counter() - began)
            going = output.push(token)
            step = [token]
        return SmallAnswer(output.generation(), probabilities, time.perf_counter() - began)

    def close(self) -> None:
        self.small.close()
        self.large.close()

    def settle(self) -> None:
        settle(self.small)
        settle(self.large)


class _Watch:
    """Can this answer still reach the threshold? Bounds over every continuation of at most `most` tokens."""

    def __init__(self, rule: CascadeRule, most: int) -> None:
        self._signal, self._threshold = rule.signal, rule.threshold
        self._most = most
        self._log_sum = 0.0
        self._below = 0

    def is_hopeless(self, probability: float) -> bool:
        if self._threshold == 0:
            return False
        self._log_sum += _log(probability)
        self._below += probability < self._threshold
        if self._signal == "mean":  # what follows has probability 1 at best
            return self._log_sum / self._most < math.log(self._threshold) - 1e-9
        return self._below >= math.ceil(_QUANTILE * self._most)


def open_cascade(
    small: Model | str | Path, large: Model | str | Path, rule: CascadeRule, options: EngineOptions | None = None
) -> TextModel:
    """Open both models on the native engine as one text model, whose `engine` is a CascadeEngine.

    Raises:
        CheckpointError: no such model, or it has no tokenizer.
        InputError: the two have different tokenizers.
    """
    from trilemma.formats.artifact import load_any

    first, second = (one if isinstance(one, Model) else load_any(one) for one in (small, large))
    tokenizer, path = tokenizer_of(second)
    require_same_tokens(tokenizer, path, *tokenizer_of(first))
    little = NativeEngine(first, options)
    try:
        return TextModel(CascadeEngine(little, NativeEngine(second, options), rule), tokenizer, path)
    except BaseException:
        little.close()
        raise


def _probability(logits: NDArray[np.float32], token: int) -> float:
    with np.errstate(over="ignore"):  # a token as unlikely as that has the probability 0
        return float(1 / np.exp(logits - logits[token]).sum(dtype=np.float64))


def _log(probability: float) -> float:
    return math.log(max(probability, 1e-300))

"""Trilemma's engines as a model of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

lm-eval 0.4 finds models in a table of its own and knows no entry points, so this file registers `trilemma` there and
hands the command line over: `trilemma lm-eval run --model trilemma --model_args path=... --tasks ...` or
`python -m trilemma.integrations.lm_eval run ...`. In Python, importing this module registers the model too.

Texts become tokens as in lm-eval's own `hf` model, so that the two give the same figures for the same weights.
Left out: batch sizes (results do not depend on them), several processes, and models that read pictures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from trilemma.core.errors import InputError, MissingExtraError
from trilemma.measure.quality.loglikelihood import (
    Likelihood,
    LikelihoodEngine,
    Request,
    encode_request,
    encode_text,
    prefix_id,
)
from trilemma.runtime.engine import EngineOptions, SamplingSettings
from trilemma.runtime.generate import generate_with_text
from trilemma.runtime.text_model import open_text_model

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise MissingExtraError("lm-eval", "eval", "Running lm-eval's tasks") from None

NAME = "trilemma"
MAX_GENERATED_TOKENS = 256  # where a task does not say
KvCache = Literal["none", "f32", "bf16", "int8", "int4"]
Isa = Literal["scalar", "avx2", "avxvnni", "avx512"]


class TrilemmaLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint or an artifact behind one of our engines.

    Args:
        path: checkpoint folder, artifact folder or hub id; `pretrained` means the same.
        runtime: engine to run on; see `trilemma list engines`.
        kv: precision of the KV cache; the model's own by default.
        threads, isa: of the engine.
        max_length: context in tokens; the model's own by default.
        max_gen_toks: most tokens of an answer where a task does not say.
        batch_size, max_batch_size, device: lm-eval passes them; they change nothing here.

    Raises:
        InputError: no path, or a context longer than the model's. CheckpointError: no model or no tokenizer there.
    """

    backend = "causal"

    def __init__(
        self,
        path: str | None = None,
        *,
        pretrained: str | None = None,
        runtime: str = "native",
        kv: KvCache | None = None,
        threads: int | str | None = None,
        isa: Isa | None = None,
        max_length: int | str | None = None,
        max_gen_toks: int | str = MAX_GENERATED_TOKENS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        place = path or pretrained
        if not place:
            raise InputError("There is no model. Give its folder: --model_args path=examples/models/hearth-7m.")
        options = EngineOptions(
            threads=None if threads is None else int(threads), kv_cache=kv, isa=isa,
            max_context=None if max_length is None else int(max_length),
        )  # fmt: skip
        self._model = open_text_model(place, runtime=runtime, options=options)
        self._place = str(place)
        self._tokenizer = self._model.tokenizer
        self._likelihoods = LikelihoodEngine(self._model.engine)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def max_length(self) -> int:
        return self._model.engine.max_context

    @property
    def eot_token_id(self) -> int:
        text = self._tokenizer.special_text("eos_token")
        found = None if text is None else self._tokenizer.token_id(text)
        return prefix_id(self._tokenizer) if found is None else found

    @property
    def prefix_token_id(self) -> int:
        return prefix_id(self._tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self._place.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        if add_special_tokens is None:
            return encode_text(self._tokenizer, string)
        return self._tokenizer.encode(string, special=add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(tokens, skip_special=skip_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Chat templates are applied by the model's own; lm-eval only needs to know that there is one."""
        return "the model's own" if chat_template and self._tokenizer.has_chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding says it) of each (context, continuation).

        Raises:
            InputError: a continuation that adds no token, or is longer than the context.
        """
        texts = [request.args for request in requests]
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(texts), desc="Log-likelihoods", disable=disable_tqdm) as bar:
            for _, same in groupby(texts, key=lambda pair: pair[0]):
                group = list(same)  # the answers to one question follow each other
                encoded = [encode_request(self._tokenizer, context, continuation) for context, continuation in group]
                for pair, likelihood in zip(group, self._likelihoods.score(encoded), strict=True):
                    found.append(_plain(likelihood))
                    self.cache_hook.add_partial("loglikelihood", pair, found[-1])
                bar.update(len(group))
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        encoded = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return [_plain(self._likelihoods.score([request])[0]) for request in encoded]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in lm-eval's windows; the first token comes after the prefix token."""
        found = []
        for request in tqdm(requests, desc="Rolling log-likelihoods", disable=disable_tqdm):
            (text,) = request.args
            total = sum(self._likelihoods.score([window])[0].nats for window in self._windows(text))
            found.append(float(total))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def _windows(self, text: str) -> Iterator[Request]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
            context_len=1,
        )  # fmt: skip
        for context, predicted in map(make_disjoint_window, pairs):
            yield Request(tuple(context), tuple(predicted))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context up to a stop text, cut at the left where it leaves no room.

        Raises:
            InputError: more tokens asked for than the context has.
        """
        found = []
        for request in tqdm(requests, desc="Answers", disable=disable_tqdm):
            context, asked = request.args
            found.append(self._continue(context, asked))
            self.cache_hook.add_partial("generate_until", (context, asked), found[-1])
        return found

    def _continue(self, context: str, asked: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(asked, self.max_gen_toks)
        most = int(wanted["max_gen_toks"])
        if most >= self.max_length:
            raise InputError(f"An answer of {most} tokens does not fit the context of {self.max_length}. Ask for less.")
        stops = handle_stop_sequences(wanted.get("until"), eos=self._tokenizer.special_text("eos_token"))
        sampled = bool(wanted.get("do_sample"))
        settings = SamplingSettings(
            max_tokens=most, temperature=float(wanted.get("temperature", 0.0)) if sampled else 0.0,
            top_p=float(wanted.get("top_p", 1.0)), top_k=int(wanted.get("top_k", 0)), seed=int(wanted.get("seed", 0)),
        )  # fmt: skip
        prompt = encode_text(self._tokenizer, context)[-(self.max_length - most) :]
        pieces: list[str] = []
        generate_with_text(
            self._model.engine, self._tokenizer, prompt, settings, lambda text: pieces.append(text), stops
        )
        return "".join(pieces)

    def close(self) -> None:
        """Free the engine."""
        self._likelihoods = LikelihoodEngine(self._model.engine)
        self._model.close()


def _plain(likelihood: Likelihood) -> tuple[float, bool]:
    return likelihood.nats, likelihood.greedy


def register() -> None:
    """Make `trilemma` a name of lm-eval's models; doing it twice changes nothing."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=TrilemmaLM)


def main(arguments: Sequence[str] | None = None) -> None:
    """lm-eval's own command line with our model in its table.

    Nothing is fetched from the hub unless HF_HUB_OFFLINE=0 is set in the environment.

    Args:
        arguments: of lm-eval; the process's own by default.
    """
    if "HF_HUB_OFFLINE" not in os.environ:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[name] = "1"
    register()
    given = list(sys.argv[1:] if arguments is None else arguments)
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *given]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


__all__ = ["TrilemmaLM", "main", "register"]

register()

if __name__ == "__main__":
    main()

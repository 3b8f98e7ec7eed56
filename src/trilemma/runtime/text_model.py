"""A model that reads and writes text: tokenizer, engine and the loop between them.

`trilemma.open(path)` returns one. Tokens become text only where whole characters are there, and
nothing after a stop text is ever shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from trilemma.core.errors import CheckpointError
from trilemma.core.quantity import format_quantity, significant
from trilemma.model.model import Model
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import open_engine
from trilemma.runtime.engine import Engine, EngineOptions, SamplingSettings
from trilemma.runtime.generate import generate_text, generate_with_text


@dataclass(frozen=True)
class Answer:
    """The text of one request and how long it took. Times are seconds from the request on."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    token_times_s: list[float] = field(default_factory=list)
    reused_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def figures(self) -> dict[str, float | int | None]:
        """Counts and times by the names of the metrics."""
        rate = 1 / self.tpot_s if self.tpot_s else None
        return {
            "prompt_tokens": self.prompt_tokens, "output_tokens": len(self.tokens),
            "ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "decode_tokens_per_s": rate,
        }  # fmt: skip

    def summary(self) -> str:
        """One line: '12 prompt + 64 output tokens, ttft 3.1 ms, tpot 1.2 ms, 830 tokens/s, stopped by length'."""
        rate = f", {significant(1 / self.tpot_s)} tokens/s" if self.tpot_s else ""
        times = f"ttft {format_quantity(self.ttft_s, 's')}, tpot {format_quantity(self.tpot_s, 's')}{rate}"
        counts = f"{self.prompt_tokens} prompt + {len(self.tokens)} output tokens"
        return f"{counts}, {times}, finished by {self.finish_reason}"


class TextModel:
    """An opened model. Use it as a context manager, or call `close` to free its memory.

    Attributes:
        engine: the engine behind it; tokenizer: the model's own; path: the folder it came from.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, path: Path) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.path = path

    def generate(self, prompt: str, *, stop: Sequence[str] = (), chat: bool = False, **sampling: int | float) -> str:
        """The text that continues `prompt`.

        Args:
            stop: texts before which to stop.
            chat: wrap the prompt in the model's chat template.
            sampling: fields of SamplingSettings: max_tokens, temperature, top_k, top_p, min_p,
                repetition_penalty, seed. Greedy by default.

        Raises:
            InputError: a setting out of range, an empty prompt, or one that fills the context.
        """
        settings = SamplingSettings.model_validate(sampling)
        return self.complete(prompt, settings, stop=stop, chat=chat).text

    def stream(
        self, prompt: str, *, stop: Sequence[str] = (), chat: bool = False, **sampling: int | float
    ) -> Iterator[str]:
        """The same, piece by piece as it comes."""
        settings = SamplingSettings.model_validate(sampling)
        return generate_text(self.engine, self.tokenizer, self.tokens_of(prompt, chat=chat), settings, stop)

    def complete(
        self,
        prompt: str,
        settings: SamplingSettings,
        *,
        stop: Sequence[str] = (),
        chat: bool = False,
        on_text: Callable[[str], bool | None] | None = None,
    ) -> Answer:
        """The text with its tokens and times; `on_text` sees each piece, and returning False stops."""
        pieces: list[str] = []

        def collect(piece: str) -> bool:
            pieces.append(piece)
            return on_text is None or on_text(piece) is not False

        ids = self.tokens_of(prompt, chat=chat)
        done = generate_with_text(self.engine, self.tokenizer, ids, settings, collect, stop)
        return Answer(
            "".join(pieces), done.tokens, done.prompt_tokens, done.finish_reason, done.token_times_s, done.reused_tokens
        )

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tokens_of(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt as the model is asked: special tokens added, or the chat template around it."""
        if not chat:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(self.tokenizer.chat([{"role": "user", "content": prompt}]), special=False)


def open_text_model(
    model: Model | str | Path, *, runtime: str = "native", options: EngineOptions | None = None
) -> TextModel:
    """Open a checkpoint folder, an artifact or a hub id with its tokenizer.

    What a prompt has in common with an earlier one is not computed again, unless `options.share_prefixes` is False.

    Raises:
        CheckpointError: no such model, or it has no tokenizer.
        UnknownNameError: no such runtime.
    """
    from trilemma.formats.artifact import load_any

    loaded = model if isinstance(model, Model) else load_any(model)
    tokenizer, path = tokenizer_of(loaded)
    options = options or EngineOptions()
    if options.share_prefixes is None:
        options = options.model_copy(update={"share_prefixes": True})
    return TextModel(open_engine(loaded, runtime=runtime, options=options), tokenizer, path)


def tokenizer_of(model: Model) -> tuple[Tokenizer, Path]:
    """The tokenizer in a model's folder, and the folder. Raises CheckpointError where there is none."""
    if model.path is None:
        raise CheckpointError(
            "This model came from no folder, so there is no tokenizer. Save it beside one, then open it."
        )
    return Tokenizer.load(model.path), model.path

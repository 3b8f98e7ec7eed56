"""Text to token ids and back: tokenizer.json, chat templates, and decoding token by token.

tokenizer.json is the truth: its post-processor decides whether a BOS is added. Only where it has
none does `add_bos_token` of tokenizer_config.json count. Slow tokenizers (tokenizer.model alone)
are not read.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from trilemma.core.errors import CheckpointError, InputError

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TRANSCRIPT_DAY = datetime.date(2024, 7, 26)  # the day that Llama 3's own template falls back to
_BROKEN = "\ufffd"  # what decoders put for bytes that are no UTF-8 (yet)


class Tokenizer:
    """The tokenizer of a model folder."""

    def __init__(
        self, fast: FastTokenizer, settings: Mapping[str, Any] | None = None, template: str | None = None
    ) -> None:
        self._fast = fast
        self._settings = dict(settings or {})
        self._template = template
        self._prefix = self._bos_prefix()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja where they are; or a GGUF file's own.

        Raises:
            CheckpointError: no tokenizer.json, or one that can not be read.
        """
        if Path(folder).is_file():
            files = tokenizer_files(Path(folder))
            if "tokenizer.json" not in files:
                raise CheckpointError(f"{folder} carries no vocabulary, so it can not read text.")
            settings = json.loads(files["tokenizer_config.json"])
            return cls(FastTokenizer.from_str(files["tokenizer.json"]), settings, settings.get("chat_template"))
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(_missing(Path(folder)))
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception
            raise CheckpointError(f"{path} can not be read: {error}. Fetch it again.") from None
        fast.no_padding()
        fast.no_truncation()
        settings = _read_settings(path.with_name("tokenizer_config.json"))
        return cls(fast, settings, _read_template(path.with_name("chat_template.jinja"), settings))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the highest id + 1."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact text, or None."""
        found: int | None = self._fast.token_to_id(token)
        return found

    def special_text(self, kind: str) -> str | None:
        """The text of 'bos_token', 'eos_token', 'unk_token' or 'pad_token', where the model's settings name it."""
        return self._special_tokens().get(kind)

    def difference(self, other: Tokenizer) -> str | None:
        """Why token ids of the two do not mean the same, or None: every token must have the same id in both."""
        ours, theirs = (one._fast.get_vocab(with_added_tokens=True) for one in (self, other))
        if ours == theirs:
            return None
        if len(ours) != len(theirs):
            return f"{len(theirs)} tokens instead of {len(ours)}"
        token = min(token for token in ours if theirs.get(token) != ours[token])
        return f"the token {token!r} has the id {theirs.get(token, 'of none')} instead of {ours[token]}"

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; with `special`, BOS and EOS exactly as the Hugging Face tokenizer adds them.

        A text made by `chat` carries its special tokens already: encode it with special=False.
        """
        ids: list[int] = self._fast.encode(text, add_special_tokens=special).ids
        return self._prefix + ids if special else ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids without BOS or EOS; for measuring text in windows."""
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Raises InputError for an id outside the vocabulary."""
        try:
            text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special)
        except OverflowError:
            raise InputError(f"Token ids must lie in 0..{self.vocab_size - 1}; got {min(ids)}.") from None
        return text

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Decode ids as they come: what `push` returns, joined, is `decode(prompt + ids)` after `decode(prompt)`."""
        return TextStream(self, prompt)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        day: datetime.date | None = None,
    ) -> str:
        """The prompt text of a conversation, by the model's own chat template (run in a sandbox).

        Args:
            messages: {"role": "user" | "assistant" | "system", "content": text} each.
            tools: descriptions of functions, for templates that know them.
            day: for templates that print the date; None: today.

        Raises:
            CheckpointError: the model has no chat template, or a broken one.
            InputError: the template refuses these messages.
        """
        from trilemma.model.chat_template import render_chat

        if self._template is None:
            raise CheckpointError(
                "This model has no chat template (chat_template.jinja, or 'chat_template' in tokenizer_config.json). "
                "Use plain text, or add the template of the model's chat version."
            )
        return render_chat(
            self._template, messages, add_generation_prompt=add_generation_prompt, special=self._special_tokens(),
            tools=tools, day=day,
        )  # fmt: skip

    def transcript(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """A whole conversation as text to calibrate or measure on; the same on every day (see `chat`)."""
        return self.chat(messages, add_generation_prompt=False, tools=tools, day=TRANSCRIPT_DAY)

    def _bos_prefix(self) -> list[int]:
        """BOS ids to put in front ourselves: asked for by the settings, and no post-processor to do it."""
        if self._settings.get("add_bos_token") is not True or self._fast.post_processor is not None:
            return []
        bos = self._special_tokens().get("bos_token")
        found = None if bos is None else self.token_id(bos)
        return [] if found is None else [found]

    def _special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and the like; each may be a string or a record with 'content'."""
        found = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = self._settings.get(key)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[key] = text
        return found


class TextStream:
    """Incremental decoding that never shows half a character.

    Ids are decoded together with those of the last shown piece, because decoders treat the first
    token of a sequence in a way of its own (Llama drops its leading space).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = 0  # of the window that is decoded
        self._shown = len(self._ids)  # ids before it have been shown

    def push(self, token: int) -> str:
        """The text that became certain with this token; often one word, sometimes nothing."""
        self._ids.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What was held back at the end; bytes that never became a character show as U+FFFD."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(_BROKEN) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


def tokenizer_files(place: Path) -> dict[str, str]:
    """Name -> text of the files that make the tokenizer of a folder, or of a GGUF file translated into them.

    Raises:
        CheckpointError: a damaged GGUF file. UnsupportedModelError: one whose vocabulary can not be translated.
    """
    if place.is_file():
        from trilemma.model.gguf.tokenizer import gguf_tokenizer_files

        return gguf_tokenizer_files(place)
    return {name: (place / name).read_text(encoding="utf-8") for name in _FILES if (place / name).is_file()}


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has tokenizer.model but no tokenizer.json. Convert it: "
            f"transformers.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        )
    return f"{folder} has no tokenizer.json. Copy the one of the original model into the folder."


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can not be read: {error}. Fetch it again.") from None
    return found if isinstance(found, dict) else {}


def _read_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None

"""Reads the items of log-likelihood tasks from local files.

Forms of JSON lines: {"query", "choices", "gold"}: the answer is the likeliest choice after the query;
{"context_options", "continuation", "gold"}: the context after which the continuation is likeliest;
{"context", "continuation"}: the continuation must be what greedy decoding says. And llama.cpp's text form of
HellaSwag: six lines an item (context, number of the right ending, four endings).
Texts are used as they stand; a space comes between context and continuation where neither has white space there.
Left out: few-shot examples, templates and generation tasks, which lm-eval has (`integrations/lm_eval.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from trilemma.core.errors import DataError
from trilemma.data.documents import read_text

Kind = Literal["choices", "contexts", "continuation"]

_KEYS: dict[Kind, tuple[str, ...]] = {
    "choices": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
    "continuation": ("context", "continuation"),
}
_HELLASWAG_LINES = 6


@dataclass(frozen=True)
class TaskItem:
    """One question: (context, continuation) of each option, and the right one (0 where there is only one).

    lengths: characters of each answer as lm-eval counts them for acc_norm.
    """

    options: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A named task of items of one kind."""

    name: str
    kind: Kind
    items: tuple[TaskItem, ...]


def read_task(name: str, path: str | Path, limit: int | None = None) -> Task:
    """The items of a task's file (.jsonl, or .txt for HellaSwag's text form; also .xz, .gz), the first `limit` of them.

    Raises:
        DataError: a file that can not be read, a line of another form, or a right answer that is not there.
    """
    if not name or "/" in name:
        raise DataError(f"'{name}' can not name a task. Give --task name=file, such as piqa=piqa.jsonl.")
    file = Path(path)
    lines = read_text(file).split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    plain = file.name.removesuffix(".xz").removesuffix(".gz")
    if plain.endswith(".txt"):
        return Task(name, "choices", _hellaswag(file, lines, limit))
    rows = [(number, _row(file, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"'{file}' holds no items.")
    kind = _kind_of(file, *rows[0])
    build = _BUILDERS[kind]
    return Task(name, kind, tuple(_item(file, number, row, kind, build) for number, row in islice(rows, limit)))


def _row(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"'{file}' line {number} is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise DataError(f"'{file}' line {number} is a {type(row).__name__}; expected an object of a task's item.")
    return row


def _kind_of(file: Path, number: int, row: Mapping[str, Any]) -> Kind:
    for kind, keys in _KEYS.items():
        if all(key in row for key in keys):
            return kind
    forms = "; ".join(", ".join(keys) for keys in _KEYS.values())
    raise DataError(f"'{file}' line {number} has the keys {sorted(row)}; a task's item has one of: {forms}.")


def _item(
    file: Path, number: int, row: Mapping[str, Any], kind: Kind, build: Callable[[Mapping[str, Any]], TaskItem]
) -> TaskItem:
    wanted = ", ".join(_KEYS[kind])
    try:
        item = build(row)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"'{file}' line {number} is not of the form of the first one ({wanted}).") from None
    if not 0 <= item.gold < len(item.options):
        raise DataError(f"'{file}' line {number}: gold is {item.gold}, but the options are 0..{len(item.options) - 1}.")
    if any(not continuation.strip() for _, continuation in item.options):
        raise DataError(f"'{file}' line {number} has an empty answer; nothing of it can be predicted.")
    return item


def _choices(row: Mapping[str, Any]) -> TaskItem:
    query, choices = row["query"], [str(choice) for choice in row["choices"]]
    return _options(query, choices, int(row["gold"]))


def _contexts(row: Mapping[str, Any]) -> TaskItem:
    contexts, continuation = [str(text) for text in row["context_options"]], row["continuation"]
    options = tuple((context, _delimited(context, continuation)) for context in contexts)
    return TaskItem(options, int(row["gold"]), (1,) * len(options))


def _continuation(row: Mapping[str, Any]) -> TaskItem:
    context, continuation = row["context"], row["continuation"]
    return TaskItem(((context, _delimited(context, continuation)),), 0, (1,))


def _options(query: str, choices: list[str], gold: int) -> TaskItem:
    options = tuple((query, _delimited(query, choice)) for choice in choices)
    return TaskItem(options, gold, tuple(len(choice) for choice in choices))


def _delimited(context: str, continuation: str) -> str:
    apart = not context or context[-1].isspace() or continuation[:1].isspace()
    return continuation if apart else f" {continuation}"


_BUILDERS: dict[Kind, Callable[[Mapping[str, Any]], TaskItem]] = {
    "choices": _choices, "contexts": _contexts, "continuation": _continuation
}  # fmt: skip


def _hellaswag(file: Path, lines: list[str], limit: int | None) -> tuple[TaskItem, ...]:
    if not lines or len(lines) % _HELLASWAG_LINES:
        raise DataError(
            f"'{file}' has {len(lines)} lines; HellaSwag's text form has {_HELLASWAG_LINES} an item (context, number "
            "of the right ending, four endings). Other tasks come as .jsonl."
        )
    items = []
    for start in islice(range(0, len(lines), _HELLASWAG_LINES), limit):
        context, gold, *endings = lines[start : start + _HELLASWAG_LINES]
        if gold.strip() not in {"0", "1", "2", "3"}:
            raise DataError(f"'{file}' line {start + 2} is '{gold}'; the number of the right ending is 0 to 3.")
        items.append(_options(context, endings, int(gold)))
    return tuple(items)

"""JSON rows as texts: a string, a field that holds one, or chat messages in the OpenAI form through a template.

Left out: pictures and sound in messages, and other forms of conversations (`conversations` with `from` and `value`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilemma.core.errors import CheckpointError, DataError, InputError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Sequence[Mapping[str, Any]] | None], str]


@dataclass(frozen=True)
class RowText:
    """The text of a row; `turns`: where its messages begin, in characters, empty where it is no conversation."""

    text: str
    turns: tuple[int, ...] = ()


def read_rows(path: Path, text: str, field: str | None, render: Render | None, *, lines: bool) -> list[RowText]:
    """The rows of a file of JSON.

    Args:
        lines: a row a line, otherwise one list of rows.
        field: the field to take, None: 'text', else 'messages'.
        render: messages and tools to text; None: conversations are refused.

    Raises:
        DataError: names file, line and fix.
    """
    rows = _json_lines(path, text) if lines else _json_list(path, text)
    return [_row_text(f"'{path}' {where}", row, field, render, path.name) for where, row in rows]


def _json_list(path: Path, text: str) -> Iterable[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is not JSON: {error}.") from None
    if not isinstance(rows, list):
        raise DataError(f"'{path}' holds a {type(rows).__name__}; expected a list of strings or of {{\"text\": ...}}.")
    return [(f"item {number}", row) for number, row in enumerate(rows)]


def _json_lines(path: Path, text: str) -> Iterable[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"'{path}' line {number} is not JSON: {error}.") from None
        yield f"line {number}", row


def _row_text(where: str, row: object, field: str | None, render: Render | None, name: str) -> RowText:
    value, keys = row, ""
    if isinstance(row, dict):
        chosen = field or ("messages" if "text" not in row and "messages" in row else "text")
        value, keys = row.get(chosen), f" with keys {sorted(row)}"
    if isinstance(value, str):
        return RowText(value)
    if isinstance(value, list) and isinstance(row, dict):
        return _conversation(where, value, row.get("tools"), render)
    wanted = f"a field '{field}'" if field else "a string, {'text': string} or {'messages': [...]}"
    raise DataError(
        f"{where} is a {type(row).__name__}{keys}; expected {wanted}. Name the field to take: '{name}#FIELD'."
    )


def _conversation(where: str, messages: list[Any], tools: Any, render: Render | None) -> RowText:
    if render is None:
        raise DataError(f"{where} holds chat messages, which are not read here. Give plain text.")
    ready = [_message(f"{where}, message {number}", item) for number, item in enumerate(messages, 1)]
    if not ready:
        raise DataError(f"{where} has no messages. Remove the row.")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is a {type(tools).__name__}; expected a list.")
    try:
        text = render(ready, tools)
    except CheckpointError as error:
        raise CheckpointError(f"{where} holds chat messages. {error}") from None
    except InputError as error:
        raise DataError(f"{where}: {error}. Mend or remove the row.") from None
    return RowText(text, _turns(ready, tools, text, render))


def _message(where: str, item: object) -> dict[str, Any]:
    """A message with its content as one string, or None where it only calls tools."""
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise DataError(f"{where} has no 'role'; expected {{'role': 'user', 'content': text}}.")
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str) and not (content is None and item.get("tool_calls")):
        raise DataError(f"{where} has a 'content' of {type(content).__name__}; expected text.")
    return {**item, "content": content}


def _part(where: str, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise DataError(f"{where} has a part of type '{kind}'; only text is read. Remove the part or the row.")


def _turns(messages: Messages, tools: Any, text: str, render: Render) -> tuple[int, ...]:
    """Where messages begin: the lengths of those shorter conversations that the text begins with."""
    starts = [0]
    for count in range(1, len(messages)):
        try:
            head = render(messages[:count], tools)
        except InputError:  # such as a template that refuses to end with the system's message
            continue
        if starts[-1] < len(head) < len(text) and text.startswith(head):
            starts.append(len(head))
    return tuple(starts)

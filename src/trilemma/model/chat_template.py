"""A model's chat template: messages to text, in jinja's sandbox, as transformers renders it.

Left out: marking which tokens the assistant wrote (`{% generation %}` blocks are rendered like any text).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trilemma.core.errors import CheckpointError, InputError

_UNFIT = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    day: datetime.date | None = None,
) -> str:
    """The text of a conversation.

    Args:
        special: 'bos_token' and the like -> their text.
        day: what a template that prints the date is told; None: today.

    Raises:
        CheckpointError: the template is broken. InputError: it refuses these messages.
    """
    moment = datetime.datetime.now() if day is None else datetime.datetime.combine(day, datetime.time())
    try:
        return _compiled(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, tools=tools, documents=None,
            strftime_now=moment.strftime, **special,
        )  # fmt: skip
    except TemplateError as error:
        raise CheckpointError(f"The chat template can not be used: {error}. Use plain text.") from None
    except _UNFIT as error:  # such as text + None inside the template
        raise InputError(f"The chat template can not use these messages: {error}") from None


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise InputError(f"The chat template refuses these messages: {message}")

"""Render chat templates as transformers' ``apply_chat_template`` does, without importing it.

Templates come with the model and are code, so they run in Jinja's immutable sandbox. A template
sees what transformers 5 shows it: the messages without their None fields, ``tools`` and
``documents`` as None, ``add_generation_prompt``, and the special tokens by name.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from antiphon.errors import ConfigError, InvalidParameterError


class ChatTemplate:
    """One model's chat template.

    Args:
        source: Jinja source.
        special_tokens: ``bos_token`` and so on to their text.
        now: The clock of templates that print a date.

    Raises:
        ConfigError: The source is not a valid template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt's text, up to where the answer begins.

        Raises:
            InvalidParameterError: There are no messages, or the template refuses them.
        """
        if not messages:
            raise InvalidParameterError("messages", "must hold at least one message")
        chat = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        values = {"tools": None, "documents": None, **self._special_tokens}
        try:
            return self._template.render(messages=chat, add_generation_prompt=True, **values)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidParameterError(
                "messages", f"the model's chat template cannot render them: {error}"
            ) from None


class _GenerationBlock(Extension):
    """``{% generation %}`` marks what the assistant said, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's name and type)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace Jinja's filter, which escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)

"""What a client gets: whole answers and events of a stream, as OpenAI writes them.

A stream is, per choice, an opening event (chat only: the role), text events and a closing event
with the finish reason; then, if asked for, one event with the usage and no choices; then
``[DONE]``. All but the text of a text event is the same for a whole stream and is serialised once.

JSON is kept to ASCII: U+2028 and U+0085 inside a string end a line for many clients, and a chunk
boundary inside a UTF-8 sequence breaks others.
"""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, ClassVar

from antiphon import __version__

DONE = b"data: [DONE]\n\n"
SYSTEM_FINGERPRINT = f"antiphon-{__version__}"
_MARK = "\0"  # stands for the text while an event's constant parts are serialised


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one HTTP request; each prompt counts once, whatever ``n`` is."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """The usage in OpenAI's words."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


class Reply(ABC):
    """Writes the answer to one HTTP request."""

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, num_choices: int, include_usage: bool) -> None:
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._include_usage = include_usage
        self._text_events = [self._split_text_event(index) for index in range(num_choices)]

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """The event before a choice's first text, if there is one."""

    def text(self, index: int, text: str) -> bytes:
        """An event with new text."""
        before, after = self._text_events[index]
        return before + encode_basestring_ascii(text).encode() + after

    def closing(self, index: int, finish_reason: str) -> bytes:
        """The event that ends a choice."""
        return self._event([self._chunk_choice(index, None, finish_reason)])

    def end(self, usage: Usage) -> bytes:
        """What ends the stream."""
        if not self._include_usage:
            return DONE
        return self._event([], usage.as_dict()) + DONE

    def whole(self, texts: Sequence[str], finish_reasons: Sequence[str], usage: Usage) -> bytes:
        """The answer in one document."""
        answers = zip(texts, finish_reasons, strict=True)
        choices = [
            self._whole_choice(index, text, reason) for index, (text, reason) in enumerate(answers)
        ]
        document = {**self._head, "object": self.whole_kind, "choices": choices}
        return json.dumps({**document, "usage": usage.as_dict()}).encode()

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        document = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self._include_usage:
            document["usage"] = usage
        return f"data: {json.dumps(document, separators=(',', ':'))}\n\n".encode()

    def _split_text_event(self, index: int) -> tuple[bytes, bytes]:
        event = self._event([self._chunk_choice(index, _MARK, None)])
        before, _, after = event.rpartition(json.dumps(_MARK).encode())
        return before, after

    @abstractmethod
    def _chunk_choice(
        self, index: int, text: str | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """A choice in an event; ``text`` is None in the closing one."""

    @abstractmethod
    def _whole_choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """A choice in a whole answer."""


class ChatReply(Reply):
    """The answer to ``POST /v1/chat/completions``."""

    id_prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        """Say who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._event([_choice(index, None, delta=delta)])

    def _chunk_choice(
        self, index: int, text: str | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return _choice(index, finish_reason, delta={} if text is None else {"content": text})

    def _whole_choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return _choice(index, finish_reason, message=message)


class TextReply(Reply):
    """The answer to ``POST /v1/completions``."""

    id_prefix = "cmpl"
    whole_kind = "text_completion"
    chunk_kind = "text_completion"

    def opening(self, index: int) -> bytes:
        """Nothing: a text has no role."""
        return b""

    def _chunk_choice(
        self, index: int, text: str | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return _choice(index, finish_reason, text=text or "")

    def _whole_choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        return _choice(index, finish_reason, text=text)


def _choice(index: int, finish_reason: str | None, **content: object) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

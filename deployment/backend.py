"""What the HTTP layer needs from the rest: something that generates, and a tokenizer.

The HTTP layer knows neither Ray nor the workers. It holds a ``Backend``, which chooses workers and
yields their output, and a ``Tokenizer``; both are protocols, so its tests run on scripted ones.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from antiphon.deployment.journey import Journey
from antiphon.messages import RequestOutput, SamplingParams

REST_OF_CONTEXT = 2**31 - 1  # as ``max_tokens``: all that fits, which the backend knows best


class Backend(Protocol):
    """Generates tokens somewhere."""

    @property
    def model_name(self) -> str:
        """The name under which clients ask for the model."""

    @property
    def max_context_tokens(self) -> int | None:
        """Prompt plus output of one request, tokens; None as long as that is not known."""

    def is_ready(self) -> tuple[bool, str]:
        """Return whether requests can be served now, and the reason in words."""

    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        journey: Journey | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs until one has a finish reason; closing the generator aborts the work.

        Args:
            request_id: Unique.
            prompt_token_ids: At least one.
            sampling: How to go on from there; ``max_tokens`` may be ``REST_OF_CONTEXT``.
            journey: Where attempts are noted.

        Raises:
            AntiphonError: Any subclass, before the first output or after it.
        """


class Detokenizer(Protocol):
    """Turns the output tokens of one choice into text, piece by piece."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that became certain with these tokens."""

    def flush(self) -> str:
        """Return what was held back, such as an incomplete UTF-8 sequence."""


class Tokenizer(Protocol):
    """Text to tokens and back; ``encode`` and ``encode_chat`` are called from several threads."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens that end an answer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenise plain text."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Apply the chat template and tokenise.

        Raises:
            InvalidParameterError: The template refuses these messages.
        """

    def detokenizer(self) -> Detokenizer:
        """Return a fresh detokenizer for one choice."""

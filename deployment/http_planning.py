"""From a checked request body to the generations it asks for.

Prompt by prompt, ``n`` choices each. Choice ``i`` of a prompt samples with ``seed + i``, whatever
else is in the request, so a batch of prompts gives what the prompts would give one by one.
"""

import asyncio
import secrets

from antiphon.deployment.backend import REST_OF_CONTEXT, Backend, Tokenizer
from antiphon.deployment.http_generation import Choice
from antiphon.deployment.journey import Journey
from antiphon.deployment.openai_api import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
)
from antiphon.deployment.shared_answer import SharedAnswer
from antiphon.errors import InvalidParameterError, PromptTooLongError, UnknownModelError
from antiphon.messages import SamplingParams

_LONG_TEXT = 8192  # characters; tokenising more takes milliseconds, which would stall every stream
_PART_CHARS = 32  # what each message or prompt is work for beside its text: template, call
_SEED_MASK = 2**63 - 1

Body = ChatCompletionRequest | CompletionRequest


class Planner:
    """Tokenises, and checks what only the model can tell."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend = backend
        self.tokenizer = tokenizer

    async def plan(self, body: Body, arrived_at: float) -> list[Choice]:
        """Decide on every choice of a request that arrived then, by ``time.monotonic``.

        Raises:
            UnknownModelError: The request names another model.
            InvalidParameterError: A prompt is empty, or prompt and max_tokens exceed the context.
            PromptTooLongError: A prompt leaves no room for output.
        """
        if body.model != self.backend.model_name:
            raise UnknownModelError(body.model, self.backend.model_name)
        choices, answer = [], SharedAnswer()
        for prompt_token_ids in await self._tokenise(body):
            max_tokens = self._max_tokens(body, len(prompt_token_ids))
            for index in range(body.n):
                sampling = self._sampling(body, max_tokens, index)
                journey = Journey(arrived_at, len(prompt_token_ids), answer)
                choices.append(Choice(prompt_token_ids, sampling, index == 0, journey))
        return choices

    @staticmethod
    def count_choices(body: Body) -> int:
        """Return how many generations a request asks for."""
        num_prompts = 1 if isinstance(body, ChatCompletionRequest) else len(body.prompt)
        return num_prompts * body.n

    @staticmethod
    def counted_field(body: Body) -> str:
        """Return the field that asks for most of them."""
        is_batch = isinstance(body, CompletionRequest) and len(body.prompt) > body.n
        return "prompt" if is_batch else "n"

    async def _tokenise(self, body: Body) -> list[list[int]]:
        # The whole body at once: hundreds of prompts may be short each.
        if _num_chars(body) < _LONG_TEXT:
            return self._encode(body)
        return await asyncio.to_thread(self._encode, body)

    def _encode(self, body: Body) -> list[list[int]]:
        if isinstance(body, ChatCompletionRequest):
            messages = [message.for_template() for message in body.messages]
            return [self.tokenizer.encode_chat(messages)]
        return [self._encode_prompt(prompt) for prompt in body.prompt]

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        self._check_token_ids(prompt)
        return prompt

    def _check_token_ids(self, token_ids: list[int]) -> None:
        vocab_size = self.tokenizer.vocab_size
        if token_ids and max(token_ids) >= vocab_size:
            raise InvalidParameterError(
                "prompt", f"token id {max(token_ids)} is not below the vocabulary's {vocab_size}"
            )

    def _max_tokens(self, body: Body, num_prompt_tokens: int) -> int:
        # Not known before the first worker is: then the one that gets the request checks.
        context = self.backend.max_context_tokens or REST_OF_CONTEXT
        if num_prompt_tokens == 0:
            raise InvalidParameterError(body.prompt_field, "has no tokens; at least one is needed")
        if num_prompt_tokens > context - 1:
            raise PromptTooLongError(num_prompt_tokens, context, body.prompt_field)
        room = context - num_prompt_tokens
        field, limit = body.output_limit
        if limit is None:
            is_chat = isinstance(body, ChatCompletionRequest)
            return REST_OF_CONTEXT if is_chat else min(DEFAULT_COMPLETION_TOKENS, room)
        if limit > room:
            raise InvalidParameterError(
                field,
                f"{limit} is too large: the prompt has {num_prompt_tokens} tokens and the context "
                f"holds {context} tokens, which leaves {room} for the output",
            )
        return limit

    def _sampling(self, body: Body, max_tokens: int, index: int) -> SamplingParams:
        seed = secrets.randbits(63) if body.seed is None else (body.seed + index) & _SEED_MASK
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            seed=seed,
            stop_token_ids=() if body.ignore_eos else tuple(self.tokenizer.eos_token_ids),
        )


def _num_chars(body: Body) -> int:
    """How much work tokenising is, in characters of text; a token id counts as one."""
    if isinstance(body, CompletionRequest):
        return sum(len(prompt) + _PART_CHARS for prompt in body.prompt)
    fields = [(one.content, one.name or "", one.tool_call_id or "") for one in body.messages]
    return sum(_PART_CHARS + sum(map(len, texts)) for texts in fields)

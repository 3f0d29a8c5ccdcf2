"""What a body is planned as, and where: tokenising much at once would stall every stream."""

import asyncio
import threading

import pytest
from scripted_backend import CharTokenizer, ScriptedBackend

from antiphon.deployment.http_planning import Body, Planner
from antiphon.deployment.openai_api import ChatCompletionRequest, CompletionRequest


class NotingTokenizer(CharTokenizer):
    """Notes which threads it was called on."""

    def __init__(self) -> None:
        self.threads: set[threading.Thread] = set()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.current_thread())
        return super().encode(text, add_special_tokens)


def chat(num_messages: int = 1, **fields: str) -> ChatCompletionRequest:
    message = {"role": "user", "content": "", **fields}
    body = {"model": "org/tiny", "messages": [message] * num_messages}
    return ChatCompletionRequest.model_validate(body)


def text(*prompts: str) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "org/tiny", "prompt": list(prompts)})


@pytest.mark.parametrize(
    ("body", "is_long"),
    [
        (text("x" * 1000), False),
        (text(*["x" * 1000] * 10), True),
        (text("x" * 9000), True),
        (text(*["x"] * 300), True),
        (chat(content="x" * 1000), False),
        (chat(10, content="x" * 1000), True),
        (chat(300), True),
        (chat(name="x" * 9000), True),
    ],
)
def test_what_is_much_in_all_is_tokenised_beside_the_event_loop(body: Body, is_long: bool) -> None:
    backend, tokenizer = ScriptedBackend(), NotingTokenizer()
    backend.max_context_tokens = 100_000
    asyncio.run(Planner(backend, tokenizer).plan(body, arrived_at=0.0))
    (thread,) = tokenizer.threads
    assert (thread is not threading.current_thread()) == is_long

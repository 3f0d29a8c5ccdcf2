"""A backend that does what a test says, a tokenizer of one token per character, a real server."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI

from antiphon.deployment.journey import Journey
from antiphon.messages import RequestOutput, SamplingParams

EOS = ord("$")
WAIT_SECONDS = 10.0


class CharTokenizer:
    """Token ids are code points; ``$`` ends an answer."""

    eos_token_ids = (EOS,)
    vocab_size = 0x110000

    def encode(self, text, add_special_tokens=True):
        return [ord(char) for char in text]

    def encode_chat(self, messages):
        turns = [f"{message['role'][0]}:{message['content']}" for message in messages]
        return self.encode("\n".join(turns) + "\n>")

    def detokenizer(self):
        return self

    def push(self, token_ids):
        return "".join(map(chr, token_ids))

    def flush(self):
        return ""


class Gate:
    """Holds a script back until the test opens it."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    async def passed(self) -> None:
        async with asyncio.timeout(6 * WAIT_SECONDS):  # never what ends a test that waits
            while not self._event.is_set():
                await asyncio.sleep(0.002)


Step = str | RequestOutput | Exception | Gate


def says(text: str, finish_reason: str | None = None, num_cached_tokens: int = 0) -> RequestOutput:
    """An output whose tokens are the characters of ``text``."""
    return RequestOutput("", [ord(char) for char in text], finish_reason, num_cached_tokens)


@dataclass
class Call:
    """One use of ``generate``."""

    request_id: str
    prompt: str
    sampling: SamplingParams
    closed: threading.Event = field(default_factory=threading.Event)

    def wait_closed(self) -> bool:
        return self.closed.wait(WAIT_SECONDS)


class ScriptedBackend:
    """Plays a script for each request and notes what was asked and when it was let go."""

    model_name = "org/tiny"
    max_context_tokens = 100

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.readiness = (True, "2 workers")
        self.plays(says("hi", "stop"))

    def plays(self, *steps: Step) -> None:
        """Every request from now on gets these steps; a string is one output without a finish."""
        self.script: Callable[[Call], Sequence[Step]] = lambda call: steps

    def is_ready(self) -> tuple[bool, str]:
        return self.readiness

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        journey: Journey | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        call = Call(request_id, "".join(map(chr, prompt_token_ids)), sampling)
        self.calls.append(call)
        try:
            for step in self.script(call):
                if isinstance(step, Gate):
                    await step.passed()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield says(step) if isinstance(step, str) else step
        finally:
            call.closed.set()


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port; yield its URL."""
    config = uvicorn.Config(app, port=0, log_level="warning", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not server.started:
            assert time.monotonic() < deadline, "the test server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the test server did not stop"

"""Requests whose answers are known, sent by many clients at once."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tiny_models import VOCAB_SIZE, oracle

from antiphon.deployment.backend import Backend
from antiphon.errors import AntiphonError
from antiphon.messages import SamplingParams

ANSWER_SECONDS = 30.0  # the bound: a heartbeat of 7.5 s, replays, and a busy machine
MAX_TOKENS = 48


@dataclass(frozen=True)
class Item:
    """A request and all that it can be answered with: ``max_tokens`` cuts it off earlier."""

    prompt: list[int]
    sampling: SamplingParams
    expected: list[int]


@dataclass
class Tally:
    """How requests ended."""

    outcomes: Counter[str] = field(default_factory=Counter)  # right, cancelled, or an error's name
    wrong: list[str] = field(default_factory=list)
    num_tokens: int = 0
    slowest_seconds: float = 0.0

    @property
    def num_errors(self) -> int:
        """Requests that ended with an honest error."""
        return self.outcomes.total() - self.outcomes["right"] - self.outcomes["cancelled"]


def make_prompts(num_prompts: int, seed: int) -> list[list[int]]:
    """Prompts of 1 to 150 tokens; every second one begins like the one before it."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for number in range(num_prompts):
        prompt = rng.choices(range(3, VOCAB_SIZE), k=rng.randint(1, 150))
        prompts.append(prompts[-1][: rng.randint(1, 100)] + prompt[:50] if number % 2 else prompt)
    return prompts


def greedy_items(model: Any, num_prompts: int, seed: int = 0) -> list[Item]:
    """Greedy requests and what ``generate()`` says."""
    sampling = SamplingParams(MAX_TOKENS, temperature=0)
    prompts = make_prompts(num_prompts, seed)
    return [Item(prompt, sampling, oracle(model, prompt, MAX_TOKENS)) for prompt in prompts]


async def seeded_items(backend: Backend, num_prompts: int, seed: int = 1) -> list[Item]:
    """Sampled requests, and what they draw while nothing disturbs them."""

    async def draw(number: int, prompt: list[int]) -> Item:
        sampling = SamplingParams(MAX_TOKENS, temperature=0.8, top_p=0.95, seed=number)
        tokens: list[int] = []
        async for output in backend.generate(f"undisturbed-{number}", prompt, sampling):
            tokens += output.token_ids
        assert len(tokens) == MAX_TOKENS
        return Item(prompt, sampling, tokens)

    prompts = make_prompts(num_prompts, seed)
    return await asyncio.gather(*(draw(n, prompt) for n, prompt in enumerate(prompts)))


class Load:
    """Clients that ask, compare every token, and sometimes leave.

    Args:
        backend: Whom they ask.
        items: What they ask for, at random.
        cancel_rate: Of requests, those whose client leaves before the end.
        seed: Of everything random here.
    """

    def __init__(
        self, backend: Backend, items: list[Item], cancel_rate: float = 0.0, seed: int = 0
    ) -> None:
        self.tally = Tally()
        self._backend = backend
        self._items = items
        self._cancel_rate = cancel_rate
        self._rng = random.Random(seed)
        self._is_stopped = False
        self._num_sent = 0

    async def run(self, num_clients: int, num_requests: int | None = None) -> None:
        """Send until ``num_requests`` were sent, or ``stop``."""
        clients = [asyncio.create_task(self._client(num_requests)) for _ in range(num_clients)]
        try:
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()

    def stop(self) -> None:
        """Send no more; what was sent goes on to its end."""
        self._is_stopped = True

    async def _client(self, num_requests: int | None) -> None:
        while not self._is_stopped and (num_requests is None or self._num_sent < num_requests):
            self._num_sent += 1
            began = time.monotonic()
            outcome = await self._send(self._rng.choice(self._items))
            self.tally.outcomes[outcome] += 1
            self.tally.slowest_seconds = max(self.tally.slowest_seconds, time.monotonic() - began)
            if outcome not in ("right", "cancelled"):
                await asyncio.sleep(0.05)  # as Retry-After would have it, if shorter

    async def _send(self, item: Item) -> str:
        leaves_after = MAX_TOKENS + 1
        if self._rng.random() < self._cancel_rate:
            leaves_after = self._rng.randrange(MAX_TOKENS)
        tokens: list[int] = []
        outputs = self._backend.generate(f"load-{self._num_sent}", item.prompt, item.sampling)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async for output in outputs:
                    tokens += output.token_ids
                    if len(tokens) >= leaves_after:
                        break
        except AntiphonError as error:
            return self._compared(tokens, item, type(error).__name__)
        except TimeoutError:
            self.tally.wrong.append(f"no end within {ANSWER_SECONDS} s")
            return "TimeoutError"
        finally:
            await outputs.aclose()
        if leaves_after <= MAX_TOKENS:
            return self._compared(tokens, item, "cancelled")
        if len(tokens) < len(item.expected):
            self.tally.wrong.append(f"{len(tokens)} of {len(item.expected)} tokens, and no error")
        return self._compared(tokens, item, "right")

    def _compared(self, tokens: list[int], item: Item, outcome: str) -> str:
        self.tally.num_tokens += len(tokens)
        if tokens != item.expected[: len(tokens)]:
            wrong = sum(a != b for a, b in zip(tokens, item.expected, strict=False))
            self.tally.wrong.append(f"{wrong} of {len(tokens)} tokens differ, {outcome}")
        return outcome

"""Virtual time, what steps take in it, and requests to fill it with.

Steps take what was measured for as many streams and prompt tokens: SmolLM2-135M on one core of an
AMD EPYC without AVX-512, contexts of about 80 tokens.
"""

import heapq
import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from antiphon.router.decision import Decision

# Milliseconds of a step by its tokens: without prompt tokens, and with some.
_DECODE_MS = ((1, 50), (2, 50), (3, 66), (5, 85), (6, 102), (8, 113), (16, 143), (24, 178))
_MIXED_MS = ((1, 60), (8, 95), (16, 120), (32, 165), (64, 255), (142, 480), (256, 860))


class Clock:
    """Events in order; stands in for the module ``time`` of the engine."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def monotonic(self) -> float:
        return self.now

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self._events and not until():
            self.now, _, event = heapq.heappop(self._events)
            event()


@dataclass(slots=True)
class Step:
    """One step of one worker."""

    began_at: float
    num_streams: int
    num_prompt_tokens: int
    seconds: float


@dataclass(slots=True)
class Served:
    """What a request got, on the virtual clock."""

    due_at: float
    num_output_tokens: int
    first_at: float = 0.0
    last_at: float = 0.0
    num_tokens: int = 0
    decision: Decision | None = None

    @property
    def ttft_seconds(self) -> float:
        return self.first_at - self.due_at

    @property
    def tpot_seconds(self) -> float:
        return (self.last_at - self.first_at) / (self.num_output_tokens - 1)

    @property
    def is_complete(self) -> bool:
        return self.num_tokens == self.num_output_tokens

    def is_inside(self, ttft_seconds: float, tpot_seconds: float) -> bool:
        """Whether both targets were kept."""
        return self.ttft_seconds <= ttft_seconds and self.tpot_seconds <= tpot_seconds


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson arrivals of requests with uniformly distributed lengths, both bounds included."""

    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    rate: float
    count: int
    seed: int = 0

    def requests(self) -> Iterable[tuple[float, int, int]]:
        """Gap before each request in seconds, its prompt tokens, its output tokens."""
        rng = random.Random(self.seed)
        for _ in range(self.count):
            gap = rng.expovariate(self.rate)
            yield gap, rng.randint(*self.prompt_tokens), rng.randint(*self.output_tokens)


def step_seconds(num_streams: int, num_prompt_tokens: int) -> float:
    """What a step takes, without noise."""
    if not num_prompt_tokens:
        return _interpolate(_DECODE_MS, num_streams) / 1e3
    mixed = _interpolate(_MIXED_MS, num_streams + num_prompt_tokens)
    return (mixed + num_streams) / 1e3


def _interpolate(table: tuple[tuple[int, int], ...], size: int) -> float:
    index = min(max(bisect_right([at for at, _ in table], size), 1), len(table) - 1)
    (low, low_ms), (high, high_ms) = table[index - 1], table[index]
    return low_ms + (high_ms - low_ms) * (size - low) / (high - low)

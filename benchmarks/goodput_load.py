"""Requests of an open-loop load: when they come, how long they are, and when they were served well.

A load is a list of requests with gaps whose mean is 1; dividing the gaps by a rate gives arrival
times. So every system and every rate sees the same requests in the same order with the same bursts.
"""

import csv
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_TRACE_PROMPT_TOKENS = 160  # mean after scaling: half a second of one core with the default model
_MAX_TRACE_TOKENS = 640
_MIN_TRACE_OUTPUT_TOKENS = 2  # there is no time between tokens with one


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request; ``gap`` is the time since the one before it, where the mean is 1."""

    gap: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths and wanted latencies, as multiples of what an idle worker takes.

    ``prompt_tokens`` and ``output_tokens`` are bounds of uniform distributions, both included.
    """

    name: str
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    ttft_multiple: float
    tpot_multiple: float
    trace: Path | None = None

    def requests(self, count: int, seed: int) -> list[LoadRequest]:
        """Make the first ``count`` requests."""
        if self.trace is not None:
            return read_trace(self.trace, count)
        rng = random.Random(seed)
        return [
            LoadRequest(
                rng.expovariate(1),
                rng.randint(*self.prompt_tokens),
                rng.randint(*self.output_tokens),
            )
            for _ in range(count)
        ]


@dataclass(frozen=True, slots=True)
class Targets:
    """Wanted seconds to the first token, and between tokens on average over a request."""

    ttft_seconds: float
    tpot_seconds: float


@dataclass(slots=True)
class Outcome:
    """What happened to one request, on one clock."""

    due_at: float  # by the schedule, whenever the driver got round to it
    num_output_tokens: int
    first_at: float | None = None
    last_at: float | None = None  # of the last token so far
    num_tokens: int = 0
    error: str | None = None

    def is_served(self, targets: Targets) -> bool:
        """Whether it is complete and was inside both targets."""
        if self.first_at is None or self.last_at is None or self.error is not None:
            return False
        if self.num_tokens < self.num_output_tokens:
            return False
        tpot = (self.last_at - self.first_at) / max(self.num_output_tokens - 1, 1)
        return self.first_at - self.due_at <= targets.ttft_seconds and tpot <= targets.tpot_seconds

    def is_missed(self, targets: Targets, now: float) -> bool:
        """Whether it cannot be served inside the targets any more."""
        if self.error is not None:
            return True
        if self.first_at is None:
            return now - self.due_at > targets.ttft_seconds
        if self.first_at - self.due_at > targets.ttft_seconds:
            return True
        is_complete = self.num_tokens >= self.num_output_tokens
        end = self.last_at if is_complete and self.last_at is not None else now
        return end - self.first_at > targets.tpot_seconds * max(self.num_output_tokens - 1, 1)


def attainment(outcomes: Iterable[Outcome], targets: Targets) -> float:
    """Share of the requests that were inside both targets."""
    served = [outcome.is_served(targets) for outcome in outcomes]
    return sum(served) / len(served)


def read_trace(path: Path, count: int) -> list[LoadRequest]:
    """Read the first requests of a trace, scaled to the machine.

    Gaps are divided by their mean. The times of a ``.jsonl`` were recorded in steps of 3 seconds:
    what shares one is spread evenly until the next. Prompts and outputs are divided by one factor,
    such that the mean prompt has 160 tokens; then both are cut at 640. Shared prefixes that a trace
    describes are left out: every prompt is fresh.

    Args:
        path: ``.csv`` with arrived_at, num_prefill_tokens and num_decode_tokens, or ``.jsonl``
            with timestamp, input_length and output_length.
        count: Of requests, from the beginning.

    Raises:
        ValueError: The trace is shorter, or of another format.
    """
    rows = _read_csv(path, count) if path.suffix == ".csv" else _spread(_read_jsonl(path, count))
    if len(rows) < count + 1:
        raise ValueError(f"{path}: has {len(rows)} requests; {count + 1} are needed")
    mean_gap = (rows[count][0] - rows[0][0]) / count
    factor = _TRACE_PROMPT_TOKENS * count / sum(row[1] for row in rows[:count])
    requests = []
    for index, (arrived_at, num_prompt, num_output) in enumerate(rows[:count]):
        gap = (arrived_at - rows[index - 1][0]) / mean_gap if index else 0.0
        prompt = max(min(round(num_prompt * factor), _MAX_TRACE_TOKENS), 1)
        output = max(min(round(num_output * factor), _MAX_TRACE_TOKENS), _MIN_TRACE_OUTPUT_TOKENS)
        requests.append(LoadRequest(gap, prompt, output))
    return requests


def _read_csv(path: Path, count: int) -> list[tuple[float, int, int]]:
    with path.open() as file:
        names = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
        rows = (tuple(float(row[name]) for name in names) for row in csv.DictReader(file))
        return [(a, int(p), int(o)) for _, (a, p, o) in zip(range(count + 1), rows, strict=False)]


def _read_jsonl(path: Path, count: int) -> list[tuple[float, int, int]]:
    rows = []
    with path.open() as file:
        for _, line in zip(range(count + 1), file, strict=False):
            row = json.loads(line)
            rows.append((row["timestamp"] / 1000, row["input_length"], row["output_length"]))
    return rows


def _spread(rows: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    times = sorted({row[0] for row in rows})
    following = dict(pairwise(times))
    following[times[-1]] = times[-1] + (times[-1] - times[0]) / max(len(times) - 1, 1)
    at_once: dict[float, int] = {}
    spread = []
    for arrived_at, num_prompt, num_output in rows:
        place = at_once.get(arrived_at, 0)
        at_once[arrived_at] = place + 1
        spread.append((arrived_at, place, num_prompt, num_output))
    return [
        (at + (following[at] - at) * place / at_once[at], num_prompt, num_output)
        for at, place, num_prompt, num_output in spread
    ]

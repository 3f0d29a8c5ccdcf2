"""The parts of the goodput benchmark that decide what its figures mean."""

import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import load_benchmark

load: Any = load_benchmark("goodput_load")
search: Any = load_benchmark("goodput_search")
TARGETS = load.Targets(ttft_seconds=1.0, tpot_seconds=0.1)


def workload(**changes: Any) -> Any:
    defaults = {
        "name": "w",
        "prompt_tokens": (10, 20),
        "output_tokens": (2, 6),
        "ttft_multiple": 5,
        "tpot_multiple": 2,
    }
    return load.Workload(**{**defaults, **changes})


def test_every_system_and_rate_gets_the_same_requests() -> None:
    requests = workload().requests(2000, seed=1)
    assert requests == workload().requests(2000, seed=1)
    assert requests != workload().requests(2000, seed=2)
    assert requests[:10] == workload().requests(10, seed=1)
    gaps = [r.gap for r in requests]
    assert statistics.mean(gaps) == pytest.approx(1.0, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1.0, rel=0.1)  # exponential
    assert {r.num_prompt_tokens for r in requests} == set(range(10, 21))
    assert {r.num_output_tokens for r in requests} == set(range(2, 7))


def test_a_trace_keeps_its_bursts_and_its_proportions(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = ["0,1000,100", "1,3000,10", "1.5,50,500", "6,200000,1", "8,1,1"]
    path.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    requests = workload(trace=path).requests(3, seed=0)
    assert [r.gap for r in requests] == [0.0, 0.5, 0.25]  # 2 s on average
    assert [r.num_prompt_tokens for r in requests] == [119, 356, 6]
    assert [r.num_output_tokens for r in requests] == [12, 2, 59]
    assert workload(trace=path).requests(4, seed=0)[-1].num_prompt_tokens == 627
    with pytest.raises(ValueError, match="has 5 requests; 6 are needed"):
        workload(trace=path).requests(5, seed=0)


def test_what_a_trace_recorded_together_is_spread_until_the_next(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": t, "input_length": 100, "output_length": 10} for t in (0, 0, 0, 3000)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert [r.gap for r in workload(trace=path).requests(3, 0)] == [0.0, 1.0, 1.0]


def outcome(**changes: Any) -> Any:
    """Due at 10 s, five tokens from 10.5 s to 10.88 s."""
    fields = {"first_at": 10.5, "last_at": 10.88, "num_tokens": 5, **changes}
    return load.Outcome(due_at=10.0, num_output_tokens=5, **fields)


@pytest.mark.parametrize(
    ("changes", "is_served"),
    [
        ({}, True),
        ({"first_at": 11.1, "last_at": 11.2}, False),  # late
        ({"last_at": 10.95}, False),  # 112 ms a token
        ({"num_tokens": 4}, False),  # not complete
        ({"error": "lost"}, False),
        ({"first_at": None, "last_at": None, "num_tokens": 0}, False),
    ],
)
def test_a_request_counts_if_it_is_whole_and_inside_both_targets(
    changes: dict[str, Any], is_served: bool
) -> None:
    assert outcome(**changes).is_served(TARGETS) is is_served
    assert outcome(**changes).is_missed(TARGETS, now=12.0) is not is_served
    assert load.attainment([outcome(), outcome(**changes)], TARGETS) == 0.5 + 0.5 * is_served


def test_a_miss_is_known_as_soon_as_it_is_sure() -> None:
    waiting = outcome(first_at=None, last_at=None, num_tokens=0)
    assert not waiting.is_missed(TARGETS, now=10.9)
    assert waiting.is_missed(TARGETS, now=11.1)
    streaming = outcome(num_tokens=2, last_at=10.6)
    assert not streaming.is_missed(TARGETS, now=10.85)
    assert streaming.is_missed(TARGETS, now=10.95)


class Server:
    """Attainment falls from 1 at ``capacity`` to 0 at twice that."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.rates: list[float] = []

    async def measure(self, rate: float) -> float:
        self.rates.append(rate)
        return min(max(2 - rate / self.capacity, 0.0), 1.0)


@pytest.mark.parametrize("capacity", [0.05, 0.3, 1.0, 1.4, 8.0])
def test_the_search_finds_where_attainment_crosses(capacity: float) -> None:
    server = Server(capacity)
    found, points = asyncio.run(search.find_goodput(server.measure, guess=1.0))
    assert found == pytest.approx(1.1 * capacity, rel=0.06)
    assert [point.rate for point in points] == server.rates
    assert len(points) <= 12


def test_a_search_that_only_has_to_beat_another_ends_at_the_first_failure() -> None:
    server = Server(0.5)
    found, points = asyncio.run(search.find_goodput(server.measure, guess=1.0, at_least=1.0))
    assert found == 0.0
    assert len(points) == 1
    server = Server(2.0)
    found, _ = asyncio.run(search.find_goodput(server.measure, guess=1.0, at_least=1.0))
    assert found == pytest.approx(2.2, rel=0.06)


def test_a_server_that_never_serves_has_no_goodput() -> None:
    server = Server(1e-9)
    found, points = asyncio.run(search.find_goodput(server.measure, guess=1.0))
    assert found == 0.0
    assert len(points) <= 12


def test_the_search_that_chose_a_system_does_not_count_for_it() -> None:
    assert search.median_of_rounds([3.0]) == 3.0
    assert search.median_of_rounds([3.0, 2.0, 1.0]) == 1.5

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
    found, measured = asyncio.run(search.find_goodput(server.measure, guess=1.0))
    assert found == pytest.approx(1.1 * capacity, rel=0.06)
    assert [point.rate for point in measured] == server.rates
    assert len(measured) <= 12


def test_a_search_that_only_has_to_beat_another_ends_at_the_first_failure() -> None:
    server = Server(0.5)
    found, measured = asyncio.run(search.find_goodput(server.measure, guess=1.0, at_least=1.0))
    assert found == 0.0
    assert len(measured) == 1
    server = Server(2.0)
    found, _ = asyncio.run(search.find_goodput(server.measure, guess=1.0, at_least=1.0))
    assert found == pytest.approx(2.2, rel=0.06)


def test_a_server_that_never_serves_has_no_goodput() -> None:
    server = Server(1e-9)
    found, measured = asyncio.run(search.find_goodput(server.measure, guess=1.0))
    assert found == 0.0
    assert len(measured) <= 12


def test_a_coarse_search_does_not_bisect() -> None:
    server = Server(1.0)
    found, measured = asyncio.run(
        search.find_goodput(server.measure, guess=1.0, bracket=search.COARSE_BRACKET)
    )
    assert found == pytest.approx(1.1, rel=0.06)
    assert len(measured) == 2


def points(*pairs: tuple[float, float]) -> list[Any]:
    return [search.Point(*pair) for pair in pairs]


def test_pooled_points_cross_where_the_closest_curve_that_does_not_rise_does() -> None:
    assert search.pooled_goodput(points((2.0, 0.8), (1.0, 1.0))) == pytest.approx(2**0.5)
    # 0.8 and 1.0 pool to 0.9, which passes; on to 0.7, nothing is left to interpolate
    assert search.pooled_goodput(points((1.0, 0.8), (1.2, 1.0), (1.5, 0.7))) == 1.2
    lucky = points((1.0, 1.0), (1.2, 0.6), (1.2, 0.6), (1.5, 0.9))  # 0.7 from 1.2 on
    assert search.pooled_goodput(lucky) == pytest.approx(1.2 ** (1 / 3))


def test_pooled_points_on_one_side_move_on() -> None:
    low, high = search.rates_around(search.pooled_goodput(points((1.0, 0.5), (1.2, 0.2))))
    assert low < high < 1.0
    low, high = search.rates_around(search.pooled_goodput(points((1.0, 1.0), (1.2, 0.95))))
    assert high > low > 1.2


def test_systems_in_turn_end_up_around_their_crossing() -> None:
    server = Server(1.0)
    seen: list[Any] = []
    goodput = 2.5
    for _ in range(8):
        for rate in search.rates_around(goodput):
            seen.append(search.Point(rate, asyncio.run(server.measure(rate))))
        goodput = search.pooled_goodput(seen)
    assert goodput == pytest.approx(1.1, rel=0.03)


def test_the_interval_of_a_ratio_is_as_wide_as_rounds_differ() -> None:
    alike = [(points((1.8, 1.0), (2.2, 0.8)), points((0.9, 1.0), (1.1, 0.8)))] * 4
    assert search.ratio_interval(alike) == pytest.approx([2.0, 2.0])
    worse = (points((1.8, 0.8), (2.2, 0.6)), points((0.9, 1.0), (1.1, 0.8)))
    low, high = search.ratio_interval([*alike[:2], worse, worse])
    assert low < 1.8 < high <= 2.01

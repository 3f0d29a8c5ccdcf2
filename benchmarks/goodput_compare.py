"""Two pools against colocated workers under one workload: each alone, then the best in turn.

Machines drift by more than two close systems differ. So a search for each system alone only says
which colocated system is the best one, and where to measure. Then it and the two pools take turns,
at rates around what all rounds so far say their goodput is.
"""

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from goodput_load import Targets, Workload
from goodput_search import (
    COARSE_BRACKET,
    FINE_BRACKET,
    Point,
    find_goodput,
    pooled_goodput,
    rates_around,
    ratio_interval,
)
from goodput_system import Driver, Load, Machine, Measured, System

from antiphon.messages import Role

MAX_OTHER_CORES = 0.15
_COLOCATED = (Role.COLOCATED, Role.COLOCATED)
_POOLS = (Role.PREFILL, Role.DECODE)
PLAIN = System("colocated_plain", _COLOCATED, 4096, keeps_targets=False)
CHUNKED = (
    System("colocated_chunked", _COLOCATED, 128, keeps_targets=True),
    System("colocated_chunked_64", _COLOCATED, 64, keeps_targets=False),
)
TWO_POOLS = System("two_pools", _POOLS, 128, keeps_targets=True)


@dataclass(frozen=True, slots=True)
class Effort:
    """How many requests a measurement takes; rates differ, so the time is what is bounded."""

    seconds: float
    least: int
    most: int
    warm_seconds: float
    rounds: int

    def load(self, workload: Workload, rate: float, seed: int) -> Load:
        """The requests for measurements around a rate; of a trace twice as many at the least."""
        least = self.least * (1 if workload.trace is None else 2)
        num_counted = min(max(round(rate * self.seconds), least), self.most)
        num_warm = max(round(rate * self.warm_seconds), 4)
        return Load(workload.requests(num_warm + 2 * num_counted, seed), num_warm, num_counted)


@dataclass(slots=True)
class Result:
    """One system under one workload: what the search found, and every measurement."""

    system: System
    found: float
    rows: list[Measured]
    rounds: list[list[Point]] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Requests per second, of the rounds where there were any.

        Of several systems, the one that searches say is best owes some of that to luck.
        """
        points = [point for points in self.rounds for point in points]
        return pooled_goodput(points) if points else self.found


async def compare(
    machine: Machine, workload: Workload, effort: Effort, seed: int
) -> dict[str, Any]:
    """Measure all systems under one workload."""
    sample = workload.requests(200, seed)
    prompt_tokens = round(statistics.mean(request.num_prompt_tokens for request in sample))
    output_tokens = round(statistics.mean(request.num_output_tokens for request in sample))
    targets = await _calibrate(machine, workload, prompt_tokens)
    print(
        f"\n{workload.name}: {prompt_tokens} tokens in, {output_tokens} out on average; targets "
        f"{targets.ttft_seconds:.2f} s to the first token, {targets.tpot_seconds * 1e3:.0f} ms each"
    )
    idle_ttft = targets.ttft_seconds / workload.ttft_multiple
    idle_tpot = targets.tpot_seconds / workload.tpot_multiple
    guess = 1.5 / (idle_ttft + output_tokens * idle_tpot / workload.tpot_multiple)
    load = effort.load(workload, guess, seed)
    bench = _Bench(machine, targets, effort)
    results = await bench.search_all(load, guess)
    two_pools, *colocated = results
    best = max(colocated, key=lambda result: result.goodput)
    await bench.take_turns((two_pools, best), load, guess)
    rounds = list(zip(two_pools.rounds, best.rounds, strict=True))
    return {
        "ratio": two_pools.goodput / best.goodput if best.goodput else None,
        "ratio_interval": ratio_interval(rounds) if rounds else None,
        "best_colocated": best.system.name,
        "colocated": best.goodput,
        "two_pools": two_pools.goodput,
        "found_alone": {result.system.name: result.found for result in results},
        "rounds": {
            result.system.name: [[asdict(point) for point in points] for points in result.rounds]
            for result in (best, two_pools)
        },
        "targets": asdict(targets),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "counted_requests": load.num_counted,
        "curve": {result.system.name: [asdict(row) for row in result.rows] for result in results},
        "flagged_rows": sum(
            row.other_cores > MAX_OTHER_CORES for result in results for row in result.rows
        ),
    }


async def _calibrate(machine: Machine, workload: Workload, num_prompt_tokens: int) -> Targets:
    """Derive targets from the fastest of three requests, one at a time."""
    idle = []
    async with machine.running(PLAIN, Targets(60.0, 60.0)) as driver:
        for _ in range(3):
            idle.append(await driver.idle_seconds(num_prompt_tokens, 12))
    return Targets(
        workload.ttft_multiple * min(seconds.ttft_seconds for seconds in idle),
        workload.tpot_multiple * min(seconds.tpot_seconds for seconds in idle),
    )


@dataclass(frozen=True, slots=True)
class _Bench:
    """What the measurements of one workload share."""

    machine: Machine
    targets: Targets
    effort: Effort

    async def search_all(self, load: Load, guess: float) -> list[Result]:
        """Search for two pools, colocated with whole prompts, and each kind of chunks.

        A kind of chunks that is not as good as what was found before is not measured to the end.
        """
        two_pools = await self._search(TWO_POOLS, load, guess)
        results = [two_pools, await self._search(PLAIN, load, two_pools.found or guess)]
        for system in CHUNKED:
            least = max(result.found for result in results[1:])
            results.append(await self._search(system, load, least or guess, least))
        return results

    async def take_turns(self, pair: tuple[Result, Result], load: Load, guess: float) -> None:
        """Measure both in each round, a little below and above where they are by now."""
        for index in range(self.effort.rounds):
            for result in pair if index % 2 == 0 else reversed(pair):
                rates = rates_around(result.goodput or guess)
                async with self._measuring(result.system, load, result.rows) as measure:
                    result.rounds.append([Point(rate, await measure(rate)) for rate in rates])

    async def _search(
        self, system: System, load: Load, guess: float, at_least: float = 0.0
    ) -> Result:
        rows: list[Measured] = []
        bracket = COARSE_BRACKET if self.effort.rounds else FINE_BRACKET
        async with self._measuring(system, load, rows) as measure:
            found, _ = await find_goodput(measure, guess, bracket, at_least)
        return Result(system, found, rows)

    @asynccontextmanager
    async def _measuring(
        self, system: System, load: Load, rows: list[Measured]
    ) -> AsyncIterator[Callable[[float], Awaitable[float]]]:
        """Start a system; what measures it at a rate prints and adds a row, returns attainment."""
        async with self.machine.running(system, self.targets) as driver:
            await _warm_up(driver)

            async def measure(rate: float) -> float:
                rows.append(await driver.measure(load, rate))
                _print_row(system, rows[-1])
                return rows[-1].attainment

            yield measure


async def _warm_up(driver: Driver) -> None:
    """Let the workers measure their steps, and the pair make its link."""
    for num_prompt_tokens in (130, 260, 130, 260):
        await driver.idle_seconds(num_prompt_tokens, 6)
    await asyncio.gather(*(driver.idle_seconds(100, 24) for _ in range(4)))


def _print_row(system: System, row: Measured) -> None:
    def tail(values: list[float]) -> float:
        return statistics.quantiles(values, n=10)[-1] if len(values) > 1 else float("nan")

    flag = " (others were busy)" if row.other_cores > MAX_OTHER_CORES else ""
    bound = "<" if row.ended_early else " "
    decisions = {reason: count for reason, count in row.decisions.items() if count}
    print(
        f"  {system.name:<20} {row.rate:6.2f}/s  {bound}{row.attainment:6.1%}  "
        f"p90 {tail(row.ttft_seconds):6.2f} s {tail(row.tpot_seconds) * 1e3:6.0f} ms  "
        f"others {row.other_cores:.2f}{flag}  {decisions}",
        flush=True,
    )

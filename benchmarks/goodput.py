"""Goodput at equal hardware: two colocated workers against one prefill and one decode worker.

    python benchmarks/goodput.py [--json FILE] [--plot FILE] [--trace PATH]... [--quick]

Goodput is the highest rate of an open-loop load at which 90 % of the requests are inside two
targets: time to the first token, and time per output token, averaged over a request. Targets are
multiples of what an idle worker takes on this machine. Each worker is a process on one core and
computes on one thread. The systems:

    colocated_plain     two colocated workers; a step computes whole prompts
    colocated_chunked   two colocated workers; the better of a fixed budget of 64 tokens a step, and
                        the budget that the target leaves beside running streams
    two_pools           one prefill and one decode worker; the router knows the targets

All get the same requests at the same times, with prompts that were never used before. Rows during
which other processes kept more than 0.15 cores busy are flagged. Machines drift by more than two
close systems differ: with ``--rounds 3`` the two pools and the best colocated system take turns in
two more searches. Only those count then: the best of three owes some of it to luck.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from goodput_load import Targets, Workload
from goodput_search import find_goodput, median_of_rounds
from goodput_system import Driver, Load, Machine, Measured, System
from machine import describe_machine

from antiphon.config import DEFAULT_MODEL
from antiphon.messages import Role
from antiphon.workers.model_source import resolve_model

MAX_OTHER_CORES = 0.15
WORKLOADS = (
    Workload("prompt_heavy_tight", (96, 192), (12, 20), ttft_multiple=5, tpot_multiple=1.5),
    Workload("prompt_heavy", (96, 192), (12, 20), ttft_multiple=5, tpot_multiple=2),
    Workload("chat", (64, 128), (32, 64), ttft_multiple=6, tpot_multiple=3),
    Workload("decode_heavy", (16, 48), (64, 96), ttft_multiple=10, tpot_multiple=3),
    Workload("long_prompt_loose", (384, 640), (8, 16), ttft_multiple=6, tpot_multiple=10),
)
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
    rounds: int = 1

    def load(self, workload: Workload, rate: float, seed: int) -> Load:
        """The requests for measurements around a rate."""
        num_counted = min(max(round(rate * self.seconds), self.least), self.most)
        num_warm = max(round(rate * self.warm_seconds), 4)
        count = num_warm + 2 * num_counted
        return Load(workload.requests(count, seed), num_warm, num_counted)


@dataclass(slots=True)
class Result:
    """One system under one workload; what it reached in each round, requests per second."""

    system: System
    rounds: list[float]
    rows: list[Measured] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Of all rounds."""
        return median_of_rounds(self.rounds)


async def calibrate(machine: Machine, workload: Workload, num_prompt_tokens: int) -> Targets:
    """Derive targets from the fastest of three requests, one at a time."""
    idle = []
    async with machine.running(PLAIN, Targets(60.0, 60.0)) as driver:
        for _ in range(3):
            idle.append(await driver.idle_seconds(num_prompt_tokens, 12))
    return Targets(
        workload.ttft_multiple * min(seconds.ttft_seconds for seconds in idle),
        workload.tpot_multiple * min(seconds.tpot_seconds for seconds in idle),
    )


async def search(
    machine: Machine,
    system: System,
    targets: Targets,
    load: Load,
    guess: float,
    at_least: float = 0.0,
) -> Result:
    """Find a system's goodput; prints every measurement."""
    rows: list[Measured] = []
    async with machine.running(system, targets) as driver:
        await _warm_up(driver)

        async def measure(rate: float) -> float:
            rows.append(await driver.measure(load, rate))
            _print_row(system, rows[-1])
            return rows[-1].attainment

        goodput, _ = await find_goodput(measure, guess, at_least)
    return Result(system, [goodput], rows)


async def compare(
    machine: Machine, workload: Workload, effort: Effort, seed: int
) -> dict[str, Any]:
    """Measure all systems under one workload."""
    sample = workload.requests(200, seed)
    prompt_tokens = round(statistics.mean(request.num_prompt_tokens for request in sample))
    output_tokens = round(statistics.mean(request.num_output_tokens for request in sample))
    targets = await calibrate(machine, workload, prompt_tokens)
    print(
        f"\n{workload.name}: {prompt_tokens} tokens in, {output_tokens} out on average; targets "
        f"{targets.ttft_seconds:.2f} s to the first token, {targets.tpot_seconds * 1e3:.0f} ms each"
    )
    idle_ttft = targets.ttft_seconds / workload.ttft_multiple
    idle_tpot = targets.tpot_seconds / workload.tpot_multiple
    guess = 1.5 / (idle_ttft + output_tokens * idle_tpot / workload.tpot_multiple)
    load = effort.load(workload, guess, seed)
    two_pools, plain, *chunked = await measure_all(machine, targets, load, guess)
    best = max(plain, *chunked, key=lambda result: result.goodput)
    for _ in range(effort.rounds - 1):
        for finalist in (best, two_pools):
            found = await search(machine, finalist.system, targets, load, finalist.goodput or guess)
            finalist.rounds += found.rounds
            finalist.rows += found.rows
    results = (two_pools, plain, *chunked)
    return {
        "ratio": two_pools.goodput / best.goodput if best.goodput else None,
        "best_colocated": best.system.name,
        "colocated_plain": plain.goodput,
        "colocated_chunked": max(result.goodput for result in chunked),
        "two_pools": two_pools.goodput,
        "rounds": {result.system.name: result.rounds for result in (best, two_pools)},
        "targets": asdict(targets),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "counted_requests": load.num_counted,
        "curve": {result.system.name: [asdict(row) for row in result.rows] for result in results},
        "flagged_rows": sum(
            row.other_cores > MAX_OTHER_CORES for result in results for row in result.rows
        ),
    }


async def measure_all(
    machine: Machine, targets: Targets, load: Load, guess: float
) -> tuple[Result, ...]:
    """Two pools, colocated with whole prompts, and each kind of chunks, in this order.

    A kind of chunks that is not as good as the one before is not measured to the end.
    """
    two_pools = await search(machine, TWO_POOLS, targets, load, guess)
    plain = await search(machine, PLAIN, targets, load, two_pools.goodput or guess)
    chunked: list[Result] = []
    for system in CHUNKED:
        least = max((result.goodput for result in chunked), default=0.0)
        start = max(least, plain.goodput) or guess
        chunked.append(await search(machine, system, targets, load, start, least))
    return two_pools, plain, *chunked


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


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw attainment against rate (png or svg)")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="csv or jsonl")
    parser.add_argument("--workload", action="append", default=[], help="only these")
    parser.add_argument("--seconds", type=float, default=25.0, help="of one measurement, about")
    parser.add_argument("--rounds", type=int, default=1, help="of the two best, taking turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two workloads, few requests")
    return parser.parse_args()


def select_workloads(options: argparse.Namespace) -> list[Workload]:
    """The built-in workloads and one for each trace that is there."""
    workloads = list(WORKLOADS)
    for path in options.trace:
        if path.exists():
            workloads.append(Workload(path.stem, (0, 0), (0, 0), 8, 3, trace=path))
        else:
            print(f"skipping the trace {path}: there is no such file")
    if options.quick:
        workloads = [w for w in workloads if w.name in ("prompt_heavy_tight", "decode_heavy")]
    return [w for w in workloads if not options.workload or w.name in options.workload]


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the figures and draw the curves, where the options ask for it."""
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        from goodput_plot import draw

        draw(report, options.plot)


def main() -> None:
    """Measure, print, write and draw."""
    options = parse_options()
    machine = describe_machine()
    for key, value in {**machine, "seed": options.seed, "model": DEFAULT_MODEL}.items():
        print(f"{key:>14}  {value}")
    effort = (
        Effort(8.0, 10, 20, 4.0)
        if options.quick
        else Effort(options.seconds, 24, 80, 6.0, options.rounds)
    )
    workers = Machine(resolve_model(DEFAULT_MODEL))
    began_at = time.monotonic()
    figures: dict[str, Any] = {}
    try:
        for workload in select_workloads(options):
            figures[workload.name] = asyncio.run(compare(workers, workload, effort, options.seed))
            report = {"workloads": figures, "machine": machine, "seed": options.seed}
            write(report, options)  # after each: a run takes half an hour
    finally:
        workers.close()
    print(f"\n{'workload':<24} {'plain':>7} {'chunked':>8} {'two pools':>10} {'ratio':>6}")
    for name, row in figures.items():
        print(
            f"{name:<24} {row['colocated_plain']:>7.2f} {row['colocated_chunked']:>8.2f} "
            f"{row['two_pools']:>10.2f} {row['ratio'] or 0:>6.2f}"
        )
    print(f"took {time.monotonic() - began_at:.0f} s")


if __name__ == "__main__":
    main()

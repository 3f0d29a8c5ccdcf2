"""Goodput in virtual time: what sharing the work out costs and gains, without a machine's moods.

    python benchmarks/goodput_simulated.py [--trace PATH]... [--requests N] [--json FILE]

The systems and workloads of ``goodput.py``, with the real router, engines and schedulers; only the
forward pass is missing, and a step takes what was measured for as many streams and prompt tokens
(``tests/support/virtual_time.py``). Targets are multiples of what that says for an idle worker. So
a run says how well the work is shared out, is the same each time, and can afford more requests.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from goodput import add_workload_options, select_workloads
from goodput_compare import CHUNKED, PLAIN, TWO_POOLS
from goodput_load import LoadRequest, Targets, Workload
from goodput_search import find_goodput
from goodput_system import System
from machine import describe_machine
from simulated_pools import serve
from virtual_time import step_seconds

_BRACKET = 1.05
_NUM_WARM = 20  # at the beginning, and as many at the end, do not count


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A load at a rate, as ``simulated_pools.serve`` wants it."""

    load: list[LoadRequest]
    rate: float
    seed: int

    def requests(self) -> Iterable[tuple[float, int, int]]:
        """Gap before each request in seconds, its prompt tokens, its output tokens."""
        for request in self.load:
            yield request.gap / self.rate, request.num_prompt_tokens, request.num_output_tokens


def compare(workload: Workload, num_requests: int, seed: int) -> dict[str, Any]:
    """Find the goodput of all systems under one workload."""
    load = workload.requests(num_requests + 2 * _NUM_WARM, seed)
    prompt_tokens = round(statistics.mean(request.num_prompt_tokens for request in load))
    output_tokens = round(statistics.mean(request.num_output_tokens for request in load))
    targets = Targets(
        workload.ttft_multiple * step_seconds(0, prompt_tokens),
        workload.tpot_multiple * step_seconds(1, 0),
    )
    goodput = {
        system.name: _goodput(system, targets, load, seed)
        for system in (TWO_POOLS, PLAIN, *CHUNKED)
    }
    best = max((name for name in goodput if name != TWO_POOLS.name), key=lambda name: goodput[name])
    return {
        "ratio": goodput[TWO_POOLS.name] / goodput[best],
        "best_colocated": best,
        "goodput": goodput,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }


def _goodput(system: System, targets: Targets, load: list[LoadRequest], seed: int) -> float:
    async def measure(rate: float) -> float:
        wanted = (targets.ttft_seconds, targets.tpot_seconds)
        pools = serve(
            system.roles,
            wanted,
            Arrivals(load, rate, seed),
            max_batch_tokens=system.max_batch_tokens,
            keeps_targets=system.keeps_targets,
        )
        counted = list(pools.served.values())[_NUM_WARM:-_NUM_WARM]
        return sum(served.is_inside(*wanted) for served in counted) / len(counted)

    goodput, _ = asyncio.run(find_goodput(measure, guess=1.0, bracket=_BRACKET))
    return goodput


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_workload_options(parser)
    parser.add_argument("--requests", type=int, default=200, help="counted for each rate")
    options = parser.parse_args()
    workloads = select_workloads(options)
    with ProcessPoolExecutor() as processes:
        futures = [
            processes.submit(compare, workload, options.requests, options.seed)
            for workload in workloads
        ]
        figures = {w.name: f.result() for w, f in zip(workloads, futures, strict=True)}
    names = (PLAIN.name, *(system.name for system in CHUNKED), TWO_POOLS.name)
    print(f"{'workload':<22}" + "".join(f"{name:>22}" for name in names) + f"{'ratio':>7}")
    for name, row in figures.items():
        cells = "".join(f"{row['goodput'][system]:>22.2f}" for system in names)
        print(f"{name:<22}{cells}{row['ratio']:>7.2f}")
    if options.json:
        report = {"workloads": figures, "machine": describe_machine(), "seed": options.seed}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

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
close systems differ, so after a search for each, the two pools and the best colocated system take
turns for ``--rounds``, and only those count.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from goodput_compare import Effort, compare
from goodput_load import Workload
from goodput_system import Machine
from machine import describe_machine

from antiphon.config import DEFAULT_MODEL
from antiphon.workers.model_source import resolve_model

WORKLOADS = (
    Workload("prompt_heavy_tight", (96, 192), (12, 20), ttft_multiple=5, tpot_multiple=1.5),
    Workload("prompt_heavy", (96, 192), (12, 20), ttft_multiple=5, tpot_multiple=2),
    Workload("chat", (64, 128), (32, 64), ttft_multiple=6, tpot_multiple=3),
    Workload("decode_heavy", (16, 48), (64, 96), ttft_multiple=10, tpot_multiple=3),
    Workload("long_prompt_loose", (384, 640), (8, 16), ttft_multiple=6, tpot_multiple=10),
)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_workload_options(parser)
    parser.add_argument("--plot", type=Path, help="draw attainment against rate (png or svg)")
    parser.add_argument("--seconds", type=float, default=25.0, help="of one measurement, about")
    parser.add_argument("--rounds", type=int, default=3, help="of the two best in turn")
    return parser.parse_args()


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which workloads, and where the figures go."""
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="csv or jsonl")
    parser.add_argument("--workload", action="append", default=[], help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two workloads, few requests")


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
        Effort(8.0, 10, 20, 4.0, rounds=0)
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
    print(f"\n{'workload':<22} {'colocated':>10} {'two pools':>10} {'ratio':>6}")
    for name, row in figures.items():
        low, high = row["ratio_interval"] or (row["ratio"] or 0,) * 2
        print(
            f"{name:<22} {row['colocated']:>10.2f} {row['two_pools']:>10.2f} "
            f"{row['ratio'] or 0:>6.2f} ({low:.2f} to {high:.2f})  {row['best_colocated']}"
        )
    print(f"took {time.monotonic() - began_at:.0f} s")


if __name__ == "__main__":
    main()

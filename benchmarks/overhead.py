"""What Antiphon adds to the model: engine steps against bare transformers, HTTP against the engine.

    python benchmarks/overhead.py [--json FILE] [--pairs N]

Engine steps run in this process on one thread, in turn with transformers' own forward on the same
batch. HTTP figures come from the default ``antiphon serve`` on this machine: each is what a client
sees minus what the worker itself measured for the same requests.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import random
import statistics
from pathlib import Path
from typing import Any

from engine_step import step_ratios
from machine import describe_machine
from served import Served, resident_bytes, serving

from antiphon.config import DEFAULT_MODEL
from antiphon.workers.model_source import resolve_model

SEED = 0
TTFT_REQUESTS = 30
STREAMS = 8
STREAM_TOKENS = 96
PROMPT_TOKENS = 16


async def ttft_overhead_seconds(served: Served) -> float:
    """Median over requests, one at a time, of HTTP time to first token minus the engine's."""
    rng = random.Random(SEED)
    differences = []
    for index in range(TTFT_REQUESTS + 3):
        before = _on_workers_seconds(served)
        times = await served.stream(_prompt(rng), 2)
        engine = _on_workers_seconds(served) - before
        if index >= 3:  # the first ones warm up
            differences.append(times[0] - engine)
    return statistics.median(differences)


async def itl_overhead_seconds(served: Served) -> tuple[float, float]:
    """Time between tokens over HTTP at 8 streams minus the engine's step, and that step."""
    rng = random.Random(SEED + 1)
    results = []
    for _ in range(4):
        steps, seconds = _decode_steps(served)
        prompts = [_prompt(rng) for _ in range(STREAMS)]
        streams = await asyncio.gather(*(served.stream(p, STREAM_TOKENS) for p in prompts))
        steps_now, seconds_now = _decode_steps(served)
        steps, seconds = steps_now - steps, seconds_now - seconds
        # Chunks may carry several tokens, so the span is divided by tokens and not by chunks.
        spans = [(times[-1] - times[0]) / (STREAM_TOKENS - 1) for times in streams]
        results.append((statistics.mean(spans) - seconds / steps, seconds / steps))
    results = results[1:]  # the first round warms up
    return statistics.median(r[0] for r in results), statistics.median(r[1] for r in results)


def _on_workers_seconds(served: Served) -> float:
    """Times to first tokens so far, without what is spent in and before the ingress."""
    name = "antiphon_time_to_first_token_part_seconds_sum"
    outside = (served.ingress_metric(name, f'part="{part}"') for part in ("route", "return"))
    return served.ingress_metric(name) - sum(outside)


def _decode_steps(served: Served) -> tuple[float, float]:
    """Steps without prompt tokens so far, and the seconds in them."""
    name, kind = "antiphon_engine_step_seconds", 'kind="decode"'
    count, total = (
        served.worker_metric("decode", f"{name}_{part}", kind) for part in ("count", "sum")
    )
    return count, total


def _prompt(rng: random.Random) -> list[int]:
    """Fresh tokens: a repeated prompt would be found in the cache."""
    return [rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]


async def measure_http() -> dict[str, float]:
    """Start the application and measure it."""
    with serving() as served:
        ttft = await ttft_overhead_seconds(served)
        itl, step = await itl_overhead_seconds(served)
        resident = resident_bytes()
        await served.http.aclose()
    return {
        "ttft_overhead_seconds": ttft,
        "itl_overhead_seconds_8": itl,
        "engine_step_seconds_8": step,
        "resident_bytes": resident["pss"],
        "resident_rss_sum_bytes": resident["rss"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--pairs", type=int, default=9, help="engine/transformers pairs per batch")
    options = parser.parse_args()
    machine = describe_machine()
    for key, value in {**machine, "seed": str(SEED), "model": DEFAULT_MODEL}.items():
        print(f"{key:>14}  {value}")
    figures: dict[str, Any] = {}
    for batch, result in step_ratios(str(resolve_model(DEFAULT_MODEL)), options.pairs).items():
        figures[f"step_ratio_{batch}"] = result["ratio"]
        print(
            f"{batch:>14}  engine {result['engine_seconds'] * 1e3:7.1f} ms   transformers "
            f"{result['transformers_seconds'] * 1e3:7.1f} ms   ratio {result['ratio']:.3f}"
        )
    figures.update(asyncio.run(measure_http()))
    for name, value in figures.items():
        print(f"{name:>28}  {value:.6g}")
    if options.json:
        options.json.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()

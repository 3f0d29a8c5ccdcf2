"""What metrics cost beside a decode step: their own work, call by call, over a real step.

    python benchmarks/metrics_cost.py

A step of the built-in model with 32 streams is timed on one thread, then what is done for metrics
because of such a step: on the worker's engine thread, and on the ingress's event loop for 32 tokens
that came with it. What happens once for a request is spread over 128 output tokens, a scrape of
each process over 15 s. Both processes' work is added up, though they run side by side.
"""

import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from engine_step import CONTEXT, SEED, decode_stepper
from machine import describe_machine

from antiphon.config import DEFAULT_MODEL, RouterConfig
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journey import Attempt, Journey
from antiphon.messages import SamplingParams
from antiphon.request_timing import RemotePrefill, RequestTiming
from antiphon.workers.batch import Batch, Chunk
from antiphon.workers.engine_stats import EngineStats
from antiphon.workers.model_source import resolve_model
from antiphon.workers.request import Request
from antiphon.workers.timeline import Handoff, Timeline
from antiphon.workers.worker_metrics import WorkerMetrics

BATCH = 32
OUTPUT_TOKENS = 128  # of a request
SCRAPE_SECONDS = 15.0
REPEATS = 2_000
STEPS = 9
LIMIT = 0.01  # of a step
REMOTE = RemotePrefill("prefill-0", 0.01, 0.2, 0.1, 0, CONTEXT)
TIMING = RequestTiming("remote", 0.001, 0.02, 0.2, 0.01, 0.02, 0.3, REMOTE)


def seconds_of(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median over five rounds of what one call takes."""
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        rounds.append((time.perf_counter() - began) / repeats)
    return statistics.median(rounds)


def worker_step() -> Callable[[], object]:
    """What an engine counts after a decode step."""
    sampling = SamplingParams(OUTPUT_TOKENS)
    requests = [Request(f"r{index}", [1, 2], sampling) for index in range(BATCH)]
    batch = Batch(tuple(Chunk(request, 1, 1, True) for request in requests))
    stats = EngineStats()
    return lambda: stats.record(batch, 0.25)


def worker_request() -> Callable[[], object]:
    """What a decode worker counts once for a request."""
    metrics = WorkerMetrics("decode")
    timeline = Timeline(1.0, 1.1, 0.0, 1.4, Handoff(REMOTE, 0.01))

    def work() -> None:
        timeline.timing("remote", (1.5, 1.8), computes_prompt=False)
        metrics.prefill_attempt("complete")
        metrics.received(CONTEXT)
        metrics.transferred(REMOTE.send, 0.01)
        metrics.request_ended("length")

    return work


def ingress_step(metrics: IngressMetrics) -> Callable[[], object]:
    """What an ingress counts for one more token of each stream."""
    journeys = [Journey(0.0) for _ in range(BATCH)]
    now = 1.0
    for journey in journeys:
        metrics.tokens_left(journey, 1, now)

    def work() -> None:
        nonlocal now
        now += 0.25
        for journey in journeys:
            metrics.tokens_left(journey, 1, now)

    return work


def ingress_request(metrics: IngressMetrics) -> Callable[[], object]:
    """What an ingress counts once for a request."""
    decision: Any = SimpleNamespace()

    def work() -> None:
        with metrics.request_in_progress():
            metrics.decision_took(5e-5)
            metrics.decided("remote")
            journey = Journey(0.0, CONTEXT)
            journey.sent(Attempt(decision, "r", 0.01))
            journey.answered(TIMING)
            metrics.first_token_came("remote", 0.5, 0.6)
            metrics.tokens_left(journey, 1, 0.8)
            journey.took(1, 1.0)
            metrics.choice_ended(journey)
            metrics.request_used(CONTEXT, OUTPUT_TOKENS)
        metrics.request_ended("length", 30.0)

    return work


def measure() -> dict[str, float]:
    """All figures, seconds."""
    step = decode_stepper(str(resolve_model(DEFAULT_MODEL)), BATCH)
    step()
    ingress = IngressMetrics(RouterConfig(target_ttft_seconds=1.0, target_itl_seconds=0.5))
    figures = {
        "decode_step": seconds_of(step, STEPS),
        "worker_per_step": seconds_of(worker_step()),
        "worker_per_request": seconds_of(worker_request()),
        "ingress_per_step": seconds_of(ingress_step(ingress)),
        "ingress_per_request": seconds_of(ingress_request(ingress)),
    }
    figures["ingress_scrape"] = seconds_of(ingress.render, 20)
    per_request = figures["worker_per_request"] + figures["ingress_per_request"]
    per_step = figures["worker_per_step"] + figures["ingress_per_step"]
    figures["all_per_step"] = per_step + per_request * BATCH / OUTPUT_TOKENS
    return figures


def main() -> None:
    """Measure and print."""
    figures = measure()
    scrapes = 2 * figures["ingress_scrape"] / SCRAPE_SECONDS  # whatever a step takes
    share = figures["all_per_step"] / figures["decode_step"] + scrapes
    print(json.dumps({**describe_machine(), "seed": SEED}, indent=2))
    for name, seconds in figures.items():
        print(f"{name:<22}{1e6 * seconds:>12.1f} us")
    print(f"{'share of a step':<22}{share:>12.3%}   aim {LIMIT:.0%}")
    least = figures["all_per_step"] / (LIMIT - scrapes)
    print(f"of that, scrapes {scrapes:.3%}; below the aim for steps from {1e3 * least:.1f} ms on")


if __name__ == "__main__":
    main()

"""What a routing decision costs: hashing the prompt, matching it, and choosing the workers.

    python benchmarks/router.py [--json FILE]

Half of the workers are prefill workers, half decode workers (one worker is a decode worker alone).
Each caches a random part of the prompt. There is no baseline to set beside it in this process: the
figures to compare with are those of a router that is asked over the network.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from antiphon.config import RouterConfig
from antiphon.messages import Load, Role, Telemetry, WorkerCard
from antiphon.router.policy import Policy
from antiphon.router.telemetry_view import ClusterView

BLOCK_SIZE = 16
NUM_WORKERS = (1, 8, 64)
NUM_TOKENS = (1024, 8192, 32_768)
SEED = 0


def make_view(num_workers: int, token_ids: list[int], rng: random.Random) -> ClusterView:
    """Build a cluster whose workers cache random prefixes of a prompt."""
    view = ClusterView()
    for i in range(num_workers):
        card = WorkerCard(
            replica_id=f"replica-{i}",
            incarnation=f"{rng.getrandbits(128):032x}",
            role=Role.DECODE if i % 2 == 0 else Role.PREFILL,
            url=f"ws://worker-{i}/session",
            model_fingerprint="model",
            block_size=BLOCK_SIZE,
            num_blocks=100_000,
            max_context_tokens=len(token_ids) + 1,
            kv_bytes_per_token=46_080,
            wire_bytes_per_token=46_080,
            pid=i,
            node="node",
        )
        load = Load(
            num_running=rng.randint(0, 32),
            num_waiting=rng.randint(0, 4),
            num_free_blocks=rng.randint(1000, 100_000),
            num_queued_tokens=rng.randint(0, 4000),
            prefill_tokens_per_second=rng.uniform(900, 1100),
            decode_step_seconds=rng.uniform(0.04, 0.06),
        )
        view.join(card)
        view.apply(card.incarnation, Telemetry(0, True, [], [], load), 0.0)
        hashes = list(view.hash_prompt(token_ids).hashes[BLOCK_SIZE])
        stored = hashes if i == 0 else hashes[: rng.randint(0, len(hashes))]
        view.apply(card.incarnation, Telemetry(1, False, stored, [], load), 0.0)
    return view


def median_us(function: Callable[[], Any], num_runs: int) -> float:
    """Return the median duration of a call in microseconds."""
    durations = []
    for _ in range(num_runs):
        started_at = time.perf_counter()
        function()
        durations.append(time.perf_counter() - started_at)
    return statistics.median(durations) * 1e6


def measure(num_workers: int, num_tokens: int, num_runs: int) -> dict[str, float]:
    """Time the steps of a decision; ``choose_us`` includes ``match_us``."""
    rng = random.Random(SEED)
    token_ids = [rng.randrange(49_152) for _ in range(num_tokens)]
    view = make_view(num_workers, token_ids, rng)
    policy = Policy(RouterConfig())
    prompt = view.hash_prompt(token_ids)
    return {
        "num_workers": num_workers,
        "num_tokens": num_tokens,
        "hash_us": median_us(lambda: view.hash_prompt(token_ids), num_runs),
        "match_us": median_us(lambda: view.match(prompt, 0.0), num_runs),
        "choose_us": median_us(lambda: policy.choose(view, prompt, 0.0), num_runs),
    }


def describe_machine() -> dict[str, str]:
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{names[0] if names else platform.processor()} x {max(len(names), 1)}",
        "python": platform.python_version(),
        "antiphon": version("antiphon"),
        "seed": str(SEED),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Time routing decisions.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--runs", type=int, default=300, help="calls for each median")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'workers':>8} {'tokens':>8} {'hash us':>9} {'match us':>9} {'choose us':>10}")
    rows = []
    for num_workers in NUM_WORKERS:
        for num_tokens in NUM_TOKENS:
            row = measure(num_workers, num_tokens, arguments.runs)
            rows.append(row)
            print(
                f"{num_workers:>8} {num_tokens:>8} {row['hash_us']:>9.0f} "
                f"{row['match_us']:>9.0f} {row['choose_us']:>10.0f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

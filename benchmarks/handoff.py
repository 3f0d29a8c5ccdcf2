"""The hand-off: bandwidth beside bare gloo, fixed cost, first contact, exposed transfer.

    python benchmarks/handoff.py [--json] [--pairs N] [--without-model]

Two processes on one core each, gloo on loopback, SmolLM2-135M's KV in float32 (46,080 bytes per
token), blocks scattered over both caches. ``--json`` prints one object and nothing else.

``bandwidth_ratio`` compares with a gloo group as torch makes it, one message at a time, each as
large as what the hand-off is given at once. Beside it: two messages at a time, and a group whose
thread is scheduled as a link's is (``workers/handoff/batch_thread.py``), which helps bare gloo too.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
from typing import Any

from handoff_link import (
    BARE,
    BYTES_PER_TOKEN,
    SEED,
    Other,
    bandwidth,
    first_contact_seconds,
    fixed_seconds,
    pieces,
    sending_process,
)
from handoff_model import exposed
from machine import describe_machine

MESSAGE_BYTES = (4 << 20, 8 << 20, 16 << 20)
PIECE_TOKENS = (32, 256, 1024, 4096)
CHUNK_SECONDS = 0.02  # what computing a chunk is taken to last where pieces are compared
EXPOSED_REQUESTS = {1024: 3, 4096: 1}


def measure_link(other: Other, pairs: int) -> dict[str, Any]:
    """Everything that needs no model."""
    rows = [bandwidth(other, size, pairs) for size in MESSAGE_BYTES]
    fixed = fixed_seconds(other)
    return {
        "bandwidth_ratio": min(row["ratio"] for row in rows),
        "fixed_seconds": fixed,
        "first_contact_seconds": first_contact_seconds(other, fixed),
        "bandwidth": rows,
        "pieces": {n: pieces(other, n, CHUNK_SECONDS) for n in PIECE_TOKENS},
    }


def report(figures: dict[str, Any]) -> None:
    """Print the tables."""
    titles = "".join(f"{title:>20}" for title in ("bare gloo", "two at a time", "batch thread"))
    print(f"\n{'at once':>10}{'hand-off':>12}{titles}")
    for row in figures["bandwidth"]:
        line = f"{row['message_bytes'] / 2**20:>6.1f} MiB"
        line += f"{row['handoff_bytes_per_second'] / 1e9:>7.2f} GB/s"
        for kind in BARE:
            rate, ratio = row[f"{kind}_bytes_per_second"], row[kind.replace("bare", "ratio")]
            line += f"{rate / 1e9:>8.2f} GB/s ({ratio:.2f})"
        print(line)
    print("\nexposed after the last chunk, by how a prompt is sent (a chunk takes 20 ms)")
    for num_tokens, row in figures["pieces"].items():
        size = f"{num_tokens * BYTES_PER_TOKEN / 2**20:.1f} MiB"
        times = f"chunks {row['chunks'] * 1e3:6.1f} ms   one piece {row['one_piece'] * 1e3:6.1f} ms"
        print(f"{num_tokens:>8} tokens {size:>10}   {times}")
    print()
    for num_tokens, row in figures.get("exposed", {}).items():
        print(
            f"{num_tokens:>8} tokens   TTFT {row['ttft_seconds']:.2f} s   exposed "
            f"{row['exposed_seconds'] * 1e3:.1f} ms   {row['exposed_ratio']:.2%}"
        )
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:>24}  {value:.6g}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--pairs", type=int, default=31, help="hand-offs and bare runs per size")
    parser.add_argument("--without-model", action="store_true", help="leave out exposed_ratio_*")
    options = parser.parse_args()
    machine = describe_machine()
    if not options.json:
        for key, value in {**machine, "seed": str(SEED)}.items():
            print(f"{key:>14}  {value}")
    with sending_process() as other:
        figures = measure_link(other, options.pairs)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    if not options.without_model:
        rows = asyncio.run(exposed(EXPOSED_REQUESTS))
        figures["exposed"] = rows
        for num_tokens, row in rows.items():
            figures[f"exposed_ratio_{num_tokens // 1024}k"] = row["exposed_ratio"]
    if options.json:
        print(json.dumps({**figures, "machine": machine}, indent=2))
    else:
        report(figures)


if __name__ == "__main__":
    main()

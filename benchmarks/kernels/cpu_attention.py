"""Paged attention on a CPU against torch SDPA on contiguous tensors, one thread, per layer.

    python benchmarks/kernels/cpu_attention.py [--json] [--repeats N]

Prefill is compared with one causal SDPA call for each prompt over keys and values that lie together
and are already repeated to the query heads; decode with one batched SDPA call over contiguous KV of
equal lengths, the query heads of a KV head standing in as query rows. Decode goes through the
caches of so many layers that none is still in the processor's cache when its turn comes again, as
in a model. Ours and the baseline run in turn, so whatever else the machine does hits both.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe_machine

from antiphon.kernels.attention_batch import AttentionFeatures
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.kv_cache import KVCache, KVLayout, LayerLayout

BLOCK_SIZE, HEAD_DIM = 16, 64
Q_HEADS, KV_HEADS = 9, 3  # SmolLM2-135M
FEATURES = AttentionFeatures(HEAD_DIM**-0.5)
KERNELS = TorchKernels()
CPU = torch.device("cpu")


MIN_PAIRS, MAX_CASE_SECONDS = 3, 6.0
COLD_BYTES = 96 * 2**20  # three times the last-level cache of the machine in the README


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    op: str
    batch: int
    tokens: int
    blocks: str

    @property
    def num_layers(self) -> int:
        """How many caches to go through."""
        if self.op == "prefill":
            return 1
        layer_bytes = 2 * 4 * self.batch * self.tokens * KV_HEADS * HEAD_DIM
        return max(2, COLD_BYTES // layer_bytes)


def cases() -> Iterator[Case]:
    """The rows."""
    for op in ("decode", "prefill"):
        for tokens in (512, 2048):
            for blocks in ("consecutive", "scattered"):
                for batch in (1, 8, 32):
                    yield Case(op, batch, tokens, blocks)


def make_tables(case: Case) -> list[list[int]]:
    """Block ids of each request."""
    blocks = list(range(case.batch * case.tokens // BLOCK_SIZE))
    if case.blocks == "scattered":
        random.Random(0).shuffle(blocks)
    per_request = case.tokens // BLOCK_SIZE
    return [blocks[i * per_request : (i + 1) * per_request] for i in range(case.batch)]


def pair(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """Ours and the baseline on the same numbers, through all layers."""
    torch.manual_seed(0)
    batch, tokens, tables = case.batch, case.tokens, make_tables(case)
    layout = KVLayout(
        (LayerLayout(KV_HEADS, HEAD_DIM, HEAD_DIM),) * case.num_layers, torch.float32, torch.float32
    )
    caches = KVCache(layout, batch * tokens // BLOCK_SIZE, BLOCK_SIZE, CPU, KERNELS).layers
    for kv in caches:
        kv.keys.normal_()
        kv.values.normal_()
    new = tokens if case.op == "prefill" else 1
    query = torch.randn(batch * new, Q_HEADS, HEAD_DIM)
    laid_out = KERNELS.make_batch(tables, [tokens - new] * batch, [new] * batch, BLOCK_SIZE, CPU)
    contiguous = [[_contiguous(x, tables) for x in (kv.keys, kv.values)] for kv in caches]

    def ours() -> None:
        for kv in caches:
            KERNELS.paged_attention(query, kv, laid_out, FEATURES)

    def decode() -> None:
        for key, value in contiguous:
            scaled_dot_product_attention(grouped, key, value)

    def prefill() -> None:
        for prompt, key, value in zip(prompts, *repeated, strict=True):
            scaled_dot_product_attention(prompt[None], key[None], value[None], is_causal=True)

    if case.op == "decode":
        grouped = query.view(batch, KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM)
        return ours, decode
    repeated = [x.repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in contiguous[0]]
    prompts = query.view(batch, tokens, Q_HEADS, HEAD_DIM).transpose(1, 2).contiguous()
    return ours, prefill


def _contiguous(cache: Tensor, tables: list[list[int]]) -> Tensor:
    """``[batch, num_kv_heads, tokens, head_dim]``."""
    return (
        torch.stack([cache[table].flatten(0, 1) for table in tables]).transpose(1, 2).contiguous()
    )


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Medians for one layer, and the median of paired ratios."""
    functions = pair(case)
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for index in range(repeats + 1):
        if index > MIN_PAIRS and time.perf_counter() - began > MAX_CASE_SECONDS:
            break
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            with torch.inference_mode():
                function()
            if index:  # the first warms up
                taken.append((time.perf_counter() - started) / case.num_layers)
    return {
        **asdict(case),
        "seconds": statistics.median(times[0]),
        "baseline_seconds": statistics.median(times[1]),
        "ratio": statistics.median(a / b for a, b in zip(*times, strict=True)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.json:
        rows = [measure(case, options.repeats) for case in cases()]
        print(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1))
        return
    for key, value in describe_machine().items():
        print(f"{key:<14} {value}")
    print(
        "\n| op | batch | tokens | blocks | ms | SDPA ms | ratio |\n|---|---|---|---|---|---|---|"
    )
    for case in cases():
        row = measure(case, options.repeats)
        print(
            f"| {case.op} | {case.batch} | {case.tokens:,} | {case.blocks} "
            f"| {row['seconds'] * 1e3:.2f} | {row['baseline_seconds'] * 1e3:.2f} "
            f"| {row['ratio']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Paged attention on a CPU against torch SDPA on contiguous tensors, one thread, per layer.

    python benchmarks/kernels/cpu_attention.py [--json] [--repeats N]

Prefill is compared with one causal SDPA call for each prompt over keys and values that lie together
and are already repeated to the query heads; decode with one batched SDPA call over contiguous KV of
equal lengths, the query heads of a KV head standing in as query rows. Ours and the baseline run in
turn, so whatever else the machine does hits both.
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
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe_machine

from antiphon.kernels.attention_batch import AttentionFeatures
from antiphon.kernels.paged_kv import PagedKV
from antiphon.kernels.torch_kernels import TorchKernels

BLOCK_SIZE, HEAD_DIM = 16, 64
Q_HEADS, KV_HEADS = 9, 3  # SmolLM2-135M
FEATURES = AttentionFeatures(HEAD_DIM**-0.5)
KERNELS = TorchKernels()
CPU = torch.device("cpu")


def cases() -> Iterator[tuple[str, int, int, bool]]:
    """Op, batch size, tokens, and whether blocks are scattered."""
    for tokens in (512, 2048):
        for scattered in (False, True):
            yield "prefill", 1, tokens, scattered
            for batch in (1, 8, 32):
                yield "decode", batch, tokens, scattered
    yield "prefill", 8, 512, True


def pair(
    op: str, batch: int, tokens: int, scattered: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Ours and the baseline on the same numbers."""
    torch.manual_seed(0)
    blocks = list(range(batch * tokens // BLOCK_SIZE))
    if scattered:
        random.Random(0).shuffle(blocks)
    per_request = tokens // BLOCK_SIZE
    tables = [blocks[i * per_request : (i + 1) * per_request] for i in range(batch)]
    keys, values = (torch.randn(len(blocks), BLOCK_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
    kv = PagedKV(keys, values)
    new = tokens if op == "prefill" else 1
    query = torch.randn(batch * new, Q_HEADS, HEAD_DIM)
    laid_out = KERNELS.make_batch(tables, [tokens - new] * batch, [new] * batch, BLOCK_SIZE, CPU)
    key, value = (
        torch.stack([x[torch.tensor(t)].reshape(tokens, KV_HEADS, HEAD_DIM) for t in tables])
        .transpose(1, 2)
        .contiguous()
        for x in (keys, values)
    )

    def ours() -> Tensor:
        return KERNELS.paged_attention(query, kv, laid_out, FEATURES)

    if op == "decode":
        grouped = query.view(batch, KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM)
        return ours, lambda: scaled_dot_product_attention(grouped, key, value)
    repeated = [x.repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in (key, value)]
    prompts = query.view(batch, tokens, Q_HEADS, HEAD_DIM).transpose(1, 2).contiguous()

    def loop() -> None:
        for prompt, k, v in zip(prompts, *repeated, strict=True):
            scaled_dot_product_attention(prompt[None], k[None], v[None], is_causal=True)

    return ours, loop


def measure(repeats: int) -> list[dict[str, object]]:
    """Medians and the median of paired ratios."""
    rows: list[dict[str, object]] = []
    for op, batch, tokens, scattered in cases():
        functions = pair(op, batch, tokens, scattered)
        times: tuple[list[float], list[float]] = ([], [])
        for index in range(repeats + 2):
            for function, taken in zip(functions, times, strict=True):
                started = time.perf_counter()
                with torch.inference_mode():
                    function()
                if index >= 2:  # the first two warm up
                    taken.append(time.perf_counter() - started)
        rows.append(
            {
                "op": op,
                "batch": batch,
                "tokens": tokens,
                "blocks": "scattered" if scattered else "in place",
                "seconds": statistics.median(times[0]),
                "baseline_seconds": statistics.median(times[1]),
                "ratio": statistics.median(a / b for a, b in zip(*times, strict=True)),
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.repeats)
    if options.json:
        print(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1))
        return
    for key, value in describe_machine().items():
        print(f"{key:<14} {value}")
    print(
        f"\n{'op':<9}{'batch':>6}{'tokens':>8}  {'blocks':<10}{'ms':>9}{'SDPA ms':>9}{'ratio':>7}"
    )
    for row in rows:
        print(
            f"{row['op']:<9}{row['batch']:>6}{row['tokens']:>8}  {row['blocks']:<10}"
            f"{float(str(row['seconds'])) * 1e3:>9.2f}"
            f"{float(str(row['baseline_seconds'])) * 1e3:>9.2f}{float(str(row['ratio'])):>7.2f}"
        )


if __name__ == "__main__":
    main()

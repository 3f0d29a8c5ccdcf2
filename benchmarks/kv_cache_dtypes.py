"""What each dtype of the KV cache costs: perplexity of real text against float32, and memory.

    python benchmarks/kv_cache_dtypes.py [--model MODEL] [--text FILE] [--tokens N] [--json FILE]

Every token is predicted from K and V that went through the cache in the given dtype, in chunks of
a few blocks, by the worker's own step. The text is this project's design document unless told.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor

from antiphon.config import DEFAULT_MODEL
from antiphon.kernels.selection import select_kernels
from antiphon.workers.checkpoint import load_model
from antiphon.workers.forward_batch import ForwardBatch
from antiphon.workers.kv_cache import KVCache
from antiphon.workers.model_source import resolve_model
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.tokenizer import Tokenizer

TEXT = Path(__file__).parent.parent / "docs/design.md"
BLOCK_SIZE = 16
CHUNK = 128
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def next_token_logits(model: PagedModel, dtype: torch.dtype, token_ids: list[int]) -> Tensor:
    """Logits ``[num_tokens, vocab_size]`` after every token, through a cache of ``dtype``."""
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    layout = replace(model.layout, dtype=dtype)
    cache = KVCache(layout, num_blocks, BLOCK_SIZE, model.device, model.kernels)
    parts = []
    for start in range(0, len(token_ids), CHUNK):
        chunk = token_ids[start : start + CHUNK]
        batch = ForwardBatch(
            input_ids=torch.tensor([chunk], device=model.device),
            position_ids=torch.arange(start, start + len(chunk), device=model.device)[None],
            logit_rows=torch.arange(len(chunk), device=model.device),
            attention=model.kernels.make_batch(
                [range(num_blocks)], [start], [len(chunk)], BLOCK_SIZE, model.device
            ),
        )
        parts.append(model.forward(batch, cache, lambda: False).float())
    return torch.cat(parts)


def compare(model: PagedModel, token_ids: list[int]) -> dict[str, dict[str, float]]:
    """Perplexity by cache dtype, against float32's, and how often the top token is the same."""
    results: dict[str, dict[str, float]] = {}
    targets = torch.tensor(token_ids[1:], device=model.device)
    exact_top = None
    for name, dtype in DTYPES.items():
        logits = next_token_logits(model, dtype, token_ids)[:-1]
        loss = float(torch.nn.functional.cross_entropy(logits, targets))
        top = logits.argmax(-1)
        exact_top = top if exact_top is None else exact_top
        results[name] = {
            "perplexity": math.exp(loss),
            "same_top_token": float((top == exact_top).float().mean()),
            "bytes_per_token": replace(model.layout, dtype=dtype).num_bytes_per_token,
        }
    for row in results.values():
        row["perplexity_ratio"] = row["perplexity"] / results["float32"]["perplexity"]
    return results


def main() -> None:
    """Print the table, with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = resolve_model(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, torch.float32, device, select_kernels(device, "colocated"))
    token_ids = Tokenizer(folder).encode(options.text.read_text())[: options.tokens]
    results = compare(model, token_ids)
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "model": options.model,
        "tokens": len(token_ids),
        "kv_cache_dtypes": results,
    }
    for key, value in report["machine"].items():
        print(f"{key:<14} {value}")
    print(f"{options.model}, {len(token_ids)} tokens of {options.text.name}\n")
    print(f"{'cache':<10}{'bytes/token':>12}{'perplexity':>12}{'ratio':>9}{'same top':>10}")
    for name, row in results.items():
        print(
            f"{name:<10}{row['bytes_per_token']:>12}{row['perplexity']:>12.3f}"
            f"{row['perplexity_ratio']:>9.4f}{row['same_top_token']:>10.1%}"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

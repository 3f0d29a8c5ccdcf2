"""Rotation and cache write on a GPU against the torch ops that it replaces.

python benchmarks/kernels/write_kv.py
"""

import torch
from scenes import HEAD_DIM, KV_HEADS, Q_HEADS, make_cache
from timing import print_environment, report, require_gpu

from antiphon.kernels import reference
from antiphon.kernels.paged_kv import Rotary
from antiphon.kernels.write_kv import write_kv


def main() -> None:
    """Time a decode step's tokens and a prompt's."""
    device = require_gpu()
    peak = print_environment()
    for dtype in (torch.bfloat16, torch.int8):
        cache = make_cache(1024, dtype, device)
        for tokens in (32, 2048):
            query, key, value = (
                torch.randn(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device=device)
                for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
            )
            angles = torch.randn(tokens, HEAD_DIM, device=device).bfloat16()
            slots = torch.randperm(1024 * 16, device=device)[:tokens]
            arguments = (query, key, value, cache, slots, Rotary(angles.cos(), angles.sin()))
            functions = {
                "antiphon": lambda a=arguments: write_kv(*a),
                "torch": lambda a=arguments: reference.write_kv(*a),
            }
            moved = 2 * query.numel() * 2 + 2 * key.numel() * (2 + dtype.itemsize)
            report(f"{tokens} tokens into {dtype}", functions, num_bytes=moved, peak=peak)


if __name__ == "__main__":
    main()

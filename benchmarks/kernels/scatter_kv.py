"""Wire to cache on a GPU against torch's index_copy_, layer by layer.

python benchmarks/kernels/scatter_kv.py
"""

import torch
from scenes import HEAD_DIM, KV_HEADS, make_cache
from timing import print_environment, report, require_gpu

from antiphon.kernels import reference
from antiphon.kernels.gather_kv import make_side_tables
from antiphon.kernels.paged_kv import WireKV
from antiphon.kernels.scatter_kv import scatter_kv

NUM_LAYERS = 32


def main() -> None:
    """Time segments of several sizes of a model with 32 layers."""
    device = require_gpu()
    peak = print_environment()
    layers = [make_cache(512, torch.bfloat16, device) for _ in range(NUM_LAYERS)]
    tables = make_side_tables(layers)
    for tokens in (16, 128, 2048):
        slots = torch.randperm(512 * 16, device=device)[:tokens]
        elements = torch.zeros(
            tokens * NUM_LAYERS * 2 * KV_HEADS * HEAD_DIM, dtype=torch.bfloat16, device=device
        )
        wire = WireKV(elements)
        functions = {
            "antiphon": lambda s=slots, w=wire: scatter_kv(layers, s, w, tables),
            "torch": lambda s=slots, w=wire: reference.scatter_kv(layers, s, w),
        }
        report(f"{tokens} tokens", functions, num_bytes=2 * elements.nbytes, peak=peak)


if __name__ == "__main__":
    main()

"""Times a copy between cache and wire on a GPU against torch's, layer by layer."""

from collections.abc import Callable, Sequence

import torch
from scenes import HEAD_DIM, KV_HEADS, make_cache
from timing import print_environment, report, require_gpu
from torch import Tensor

from antiphon.kernels.gather_kv import SideTable, make_side_tables
from antiphon.kernels.paged_kv import PagedKV, WireKV

NUM_LAYERS = 32


def time_copies(
    op: Callable[[Sequence[PagedKV], Tensor, WireKV, Sequence[SideTable]], None],
    twin: Callable[[Sequence[PagedKV], Tensor, WireKV], None],
) -> None:
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
            "antiphon": lambda s=slots, w=wire: op(layers, s, w, tables),
            "torch": lambda s=slots, w=wire: twin(layers, s, w),
        }
        report(f"{tokens} tokens", functions, num_bytes=2 * elements.nbytes, peak=peak)

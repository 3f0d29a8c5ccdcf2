"""Which tiles of query rows a prefill launch computes, and in what order."""

from collections.abc import Sequence

import torch

from antiphon.kernels.attention_batch import PrefillPlan


def plan_prefill(
    num_new: Sequence[int],
    seq_lens: Sequence[int],
    first_request: int,
    block_m: int,
    device: torch.device,
) -> PrefillPlan:
    """Cut the new tokens of requests into tiles, the one with the longest context first.

    A multiprocessor that gets a long tile last keeps the launch waiting, so those go first.

    Args:
        num_new: New tokens of each request.
        seq_lens: Tokens in each context, the new ones included.
        first_request: Index in the batch of the first of these requests.
        block_m: Query rows of a tile.
        device: Where the plan is read.
    """
    tiles = [
        (end - new + min(row + block_m, new), first_request + index, row)
        for index, (new, end) in enumerate(zip(num_new, seq_lens, strict=True))
        for row in range(0, new, block_m)
    ]
    tiles.sort(reverse=True)
    flat = [(request, row) for _, request, row in tiles]
    return PrefillPlan(torch.tensor(flat, dtype=torch.int32, device=device).view(-1, 2), block_m)

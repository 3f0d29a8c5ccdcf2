"""Memory that one step's torch ops take again and again."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Tensors by name that grow to the largest anyone asked for; for one thread.

    Args:
        device: Where they live.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._held: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, name: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return uninitialised memory; what was taken under this name and dtype is void."""
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=self._device)
            self._held[name, dtype] = held
        return held[:size].view(shape)

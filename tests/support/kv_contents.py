"""Looks behind a KV cache's back."""

import torch
from torch import Tensor

from antiphon.workers.kv_cache import KVCache


def cache_tensors(cache: KVCache) -> list[Tensor]:
    """K and V of each layer, in order."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def fill_with_garbage(cache: KVCache) -> None:
    """What was never written must never be read: make it show."""
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
            if tensor is None:
                continue
            if tensor.dtype == torch.int8:
                tensor.fill_(77)
            else:
                tensor.fill_(float("nan"))

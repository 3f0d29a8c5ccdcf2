"""Segments in wire order carry KV between caches that have nothing but the layout in common."""

import random

import pytest
import torch

from antiphon.workers.kv_cache import KVCache, KVLayout, LayerLayout

UNEVEN = (LayerLayout(2, 8, 8), LayerLayout(1, 12, 4), LayerLayout(4, 3, 5))


def cache_of(
    num_blocks: int, block_size: int, dtype: torch.dtype, fill: float | None = None
) -> KVCache:
    cache = KVCache(KVLayout(UNEVEN, dtype), num_blocks, block_size, torch.device("cpu"))
    for tensor in (*cache.keys, *cache.values):
        if fill is None:
            tensor.copy_(torch.randn(tensor.shape))
        else:
            tensor.fill_(fill)
    return cache


def token(cache: KVCache, table: list[int], position: int) -> list[torch.Tensor]:
    """K and V of one token in every layer, read the slow way."""
    block, offset = table[position // cache.block_size], position % cache.block_size
    tensors = [t for pair in zip(cache.keys, cache.values, strict=True) for t in pair]
    return [tensor[block, offset] for tensor in tensors]


def segment(cache: KVCache, num_tokens: int) -> torch.Tensor:
    return torch.empty(cache.num_bytes_per_token * num_tokens, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_sizes", [(4, 4), (4, 7), (16, 1), (1, 5)], ids=str)
def test_tokens_cross_between_block_sizes_unchanged(
    dtype: torch.dtype, block_sizes: tuple[int, int]
) -> None:
    rng = random.Random(0)
    source, target = (cache_of(200 // size, size, dtype) for size in block_sizes)
    before = [t.clone() for t in (*target.keys, *target.values)]
    tables = [rng.sample(range(c.num_blocks), -(-40 // c.block_size)) for c in (source, target)]
    for start, end in [(0, 1), (3, 11), (11, 40)]:
        wire = segment(source, end - start)
        source.gather(tables[0], start, end, wire)
        target.scatter(tables[1], start, end, wire)
        for position in range(start, end):
            for sent, arrived in zip(
                token(source, tables[0], position), token(target, tables[1], position), strict=True
            ):
                assert torch.equal(sent, arrived)
    untouched = set(range(target.num_blocks)) - set(tables[1])
    for old, new in zip(before, (*target.keys, *target.values), strict=True):
        assert torch.equal(old[sorted(untouched)], new[sorted(untouched)])


def test_the_wire_is_layer_by_layer_keys_then_values() -> None:
    cache = cache_of(4, 2, torch.float32)
    wire = segment(cache, 3)
    cache.gather([2, 0], 0, 3, wire)
    parts = [
        torch.stack([token(cache, [2, 0], p)[i] for p in range(3)]).flatten() for i in range(6)
    ]
    assert torch.equal(wire.view(torch.float32), torch.cat(parts))
    assert cache.num_bytes_per_token == 4 * (2 * 16 + 16 + 4 * 8)


def test_a_scatter_writes_nothing_beside_its_tokens() -> None:
    cache = cache_of(3, 4, torch.float32, fill=7.0)
    wire = segment(cache, 2)
    wire.view(torch.float32).fill_(1.0)
    cache.scatter([1, 2], 3, 5, wire)
    for tensor in (*cache.keys, *cache.values):
        slots = tensor.view(12, -1)
        assert (slots[[7, 8]] == 1.0).all()
        assert (slots[[i for i in range(12) if i not in (7, 8)]] == 7.0).all()

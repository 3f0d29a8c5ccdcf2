"""Segments in wire order carry KV between caches that have nothing but the layout in common."""

import itertools
import random

import pytest
import torch
from kv_contents import cache_tensors, fill_with_garbage

from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.workers.kv_cache import KVCache, KVLayout, LayerLayout

UNEVEN = (LayerLayout(2, 8, 8), LayerLayout(1, 12, 4), LayerLayout(4, 3, 5))


def cache_of(
    num_blocks: int, block_size: int, dtype: torch.dtype, fill: float | None = None
) -> KVCache:
    layout = KVLayout(UNEVEN, dtype, dtype)
    cache = KVCache(layout, num_blocks, block_size, torch.device("cpu"), TorchKernels())
    for tensor in cache_tensors(cache):
        if fill is None:
            tensor.copy_(torch.randn(tensor.shape))
        else:
            tensor.fill_(fill)
    return cache


def token(cache: KVCache, table: list[int], position: int) -> list[torch.Tensor]:
    """K and V of one token in every layer, read the slow way."""
    block, offset = table[position // cache.block_size], position % cache.block_size
    return [tensor[block, offset] for tensor in cache_tensors(cache)]


def segment(cache: KVCache, num_tokens: int) -> torch.Tensor:
    return torch.empty(cache.num_bytes_per_token * num_tokens, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_sizes", [(4, 4), (4, 7), (16, 1), (1, 5)], ids=str)
def test_tokens_cross_between_block_sizes_unchanged(
    dtype: torch.dtype, block_sizes: tuple[int, int]
) -> None:
    rng = random.Random(0)
    source, target = (cache_of(200 // size, size, dtype) for size in block_sizes)
    before = [t.clone() for t in cache_tensors(target)]
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
    for old, new in zip(before, cache_tensors(target), strict=True):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_block_is_kept_as_it_goes_over_the_wire(dtype: torch.dtype) -> None:
    """What makes moving it one copy from end to end, or two where there are scales."""
    layout = KVLayout((LayerLayout(2, 8, 8),) * 3, dtype, dtype)
    cache = KVCache(layout, 5, 4, torch.device("cpu"), TorchKernels())
    fill_with_garbage(cache)
    for index, tensor in enumerate(cache_tensors(cache)):
        tensor[3] = index
    wire = segment(cache, 4)
    cache.gather([3], 0, 4, wire)
    size = 3 * 2 * 4 * 2 * 8 * dtype.itemsize
    kept = torch.tensor([], dtype=dtype).set_(cache.layers[0].keys.untyped_storage())
    assert torch.equal(wire[-size:], kept.view(torch.uint8)[3 * size : 4 * size])


def test_tokens_beyond_the_block_table_are_refused() -> None:
    cache = cache_of(4, 2, torch.float32)
    with pytest.raises(IndexError, match="token 4 is beyond the 2 blocks"):
        cache.gather([2, 0], 3, 5, segment(cache, 2))
    with pytest.raises(IndexError, match="token 4 is beyond the 2 blocks"):
        cache.scatter([2, 0], 3, 5, segment(cache, 2))


def test_a_scatter_writes_nothing_beside_its_tokens() -> None:
    cache = cache_of(3, 4, torch.float32, fill=7.0)
    wire = segment(cache, 2)
    wire.view(torch.float32).fill_(1.0)
    cache.scatter([1, 2], 3, 5, wire)
    for tensor in cache_tensors(cache):
        slots = tensor.reshape(12, -1)
        assert (slots[[7, 8]] == 1.0).all()
        assert (slots[[i for i in range(12) if i not in (7, 8)]] == 7.0).all()


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
# Largest error of one conversion, relative to the largest element of its token and head.
STEPS = {
    torch.float32: 1e-7,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
    torch.int8: 0.5 / 127,
    torch.float8_e4m3fn: 2**-4,
}


@pytest.mark.parametrize("wire_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_caches_of_different_dtypes_exchange_kv(
    dtypes: tuple[torch.dtype, torch.dtype], wire_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    kernels = TorchKernels()
    source, target = (
        KVCache(KVLayout(UNEVEN, dtype, wire_dtype), 6, size, torch.device("cpu"), kernels)
        for dtype, size in zip(dtypes, (4, 3), strict=True)
    )
    fill_with_garbage(source)
    fill_with_garbage(target)
    written = []
    slots = torch.tensor([block * 4 + offset for block in (5, 1) for offset in range(4)])
    for layer in source.layers:
        key, value = (torch.randn(8, *t.shape[2:]) for t in (layer.keys, layer.values))
        kernels.write_kv(key, key, value, layer, slots)
        written += [key[1:8], value[1:8]]
    wire = segment(source, 7)
    source.gather([5, 1], 1, 8, wire)
    target.scatter([4, 0, 2], 1, 8, wire)
    arrived = []
    for layer in target.layers:
        rows = torch.tensor([(4, 0, 2)[p // 3] * 3 + p % 3 for p in range(1, 8)])
        for cache, scales in (
            (layer.keys, layer.key_scales),
            (layer.values, layer.value_scales),
        ):
            elements = cache.float().flatten(0, 1)[rows]
            if scales is not None:
                elements *= scales.transpose(1, 2).reshape(-1, cache.shape[2])[rows][..., None]
            arrived.append(elements)
    bound = sum(STEPS[dtype] for dtype in (dtypes[0], wire_dtype, dtypes[1]))
    for expected, actual in zip(written, arrived, strict=True):
        largest = expected.abs().amax(-1, keepdim=True)
        assert ((actual - expected).abs() <= 1.1 * bound * largest).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_wire_carries_a_quantised_cache_unchanged(dtype: torch.dtype) -> None:
    layout = KVLayout(UNEVEN, dtype, dtype)
    source, target = (KVCache(layout, 2, 4, torch.device("cpu"), TorchKernels()) for _ in range(2))
    for layer in source.layers:
        key, value = (torch.randn(8, *t.shape[2:]) for t in (layer.keys, layer.values))
        TorchKernels().write_kv(key, key, value, layer, torch.arange(8))
    wire = segment(source, 8)
    source.gather([0, 1], 0, 8, wire)
    target.scatter([0, 1], 0, 8, wire)
    for sent, arrived in zip(source.layers, target.layers, strict=True):
        assert torch.equal(sent.keys.view(torch.int8), arrived.keys.view(torch.int8))
        assert torch.equal(sent.values.view(torch.int8), arrived.values.view(torch.int8))
        assert torch.equal(sent.key_scales, arrived.key_scales)
        assert torch.equal(sent.value_scales, arrived.value_scales)

"""Rotation and cache writes against the torch twin, on a GPU or in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from antiphon.kernels import reference
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV, Rotary
from antiphon.kernels.write_kv import write_kv

pytestmark = pytest.mark.interpreter
SLOTS = [7, 0, 33, -1, 14]


def make_cache(
    dims: tuple[int, int], num_heads: int, dtype: torch.dtype, device: torch.device
) -> PagedKV:
    shape = (5, 8, num_heads)
    keys, values = (torch.zeros((*shape, dim), device=device).to(dtype) for dim in dims)
    if dtype not in QUANTISED_LIMITS:
        return PagedKV(keys, values)
    return PagedKV(keys, values, *(torch.zeros(5, num_heads, 8, device=device) for _ in range(2)))


def make_rotary(num_tokens: int, rotary_dim: int, dtype: torch.dtype) -> Rotary:
    angles = torch.randn(num_tokens, rotary_dim // 2)
    return Rotary(angles.cos().repeat(1, 2).to(dtype), angles.sin().repeat(1, 2).to(dtype))


def both(
    dims: tuple[int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    rotary_dim: int,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor]]:
    """Query and cache contents of the kernel and of the reference."""
    torch.manual_seed(0)
    query = torch.randn(5, 4, dims[0]).to(device, dtype)
    key, value = (torch.randn(5, 2, dim).to(device, dtype) for dim in dims)
    key[1] = 0.0  # a row whose scale is 0
    rotary = make_rotary(5, rotary_dim, dtype) if rotary_dim else None
    if rotary is not None:
        rotary = Rotary(rotary.cos.to(device), rotary.sin.to(device))
    slots = torch.tensor(SLOTS, dtype=torch.int64, device=device)
    results = []
    for op in (write_kv, reference.write_kv):
        kv = make_cache(dims, 2, cache_dtype, device)
        out = op(query, key, value, kv, slots, rotary)
        scales = [x for x in (kv.key_scales, kv.value_scales) if x is not None]
        results.append([out.float(), kv.keys.float(), kv.values.float(), *scales])
    return results[0], results[1]


@pytest.mark.parametrize("rotary_dim", [0, 16, 64])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (64, 12)], ids=str)
def test_float_caches(
    dims: tuple[int, int], cache_dtype: torch.dtype, rotary_dim: int, device: torch.device
) -> None:
    actual, expected = both(dims, torch.float32, cache_dtype, rotary_dim, device)
    step = torch.finfo(cache_dtype).eps
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=max(step, 1e-5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_dtype", QUANTISED_LIMITS, ids=str)
def test_quantised_caches_hold_the_same_elements(
    dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device
) -> None:
    actual, expected = both((64, 32), dtype, cache_dtype, 0, device)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rotation(dtype: torch.dtype, device: torch.device) -> None:
    actual, expected = both((64, 64), dtype, dtype, 64, device)
    bound = 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    slots=st.lists(st.integers(0, 39), min_size=1, max_size=9, unique=True),
    heads=st.sampled_from([(2, 2), (4, 1), (9, 3)]),
    dims=st.sampled_from([(64, 64), (80, 80), (48, 32), (3, 5)]),
    half_rotary=st.sampled_from([0, 1, 8]),
    cache_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]),
)
def test_random_shapes(
    slots: list[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    half_rotary: int,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    query = torch.randn(len(slots), heads[0], dims[0], device=device)
    key, value = (torch.randn(len(slots), heads[1], dim, device=device) for dim in dims)
    rotary = None
    if half_rotary:
        rotary = make_rotary(len(slots), min(2 * half_rotary, dims[0] // 2 * 2), torch.float32)
        rotary = Rotary(rotary.cos.to(device), rotary.sin.to(device))
    where = torch.tensor(slots, dtype=torch.int64, device=device)
    caches = [make_cache(dims, heads[1], cache_dtype, device) for _ in range(2)]
    actual = write_kv(query, key, value, caches[0], where, rotary)
    expected = reference.write_kv(query, key, value, caches[1], where, rotary)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # A rotated element between two steps of the format may go either way.
    relative = {torch.bfloat16: 8e-3, torch.float8_e4m3fn: 0.13}.get(cache_dtype, 1e-5)
    absolute = 1.0 if cache_dtype == torch.int8 else 1e-5
    keys, expected_keys = (cache.keys.float() for cache in caches)
    torch.testing.assert_close(keys, expected_keys, rtol=relative, atol=absolute)
    assert torch.equal(caches[0].values.float(), caches[1].values.float())


def test_a_cache_beyond_32_bit_offsets(device: torch.device) -> None:
    num_blocks = 2**31 // (16 * 2 * 64) + 2
    shape = (num_blocks, 16, 2, 64)
    kv = PagedKV(*(torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2)))
    x = torch.randn(2, 2, 64, device=device).half()
    kv.keys[0] = 7.0  # where an offset that wrapped round would land
    slots = torch.tensor([num_blocks * 16 - 1, num_blocks * 16 - 16], device=device)
    write_kv(x, x, -x, kv, slots)
    assert torch.equal(kv.keys[-1, [15, 0]], x)
    assert torch.equal(kv.values[-1, [15, 0]], -x)
    assert bool((kv.keys[0] == 7.0).all())


def test_views_of_a_merged_projection(device: torch.device) -> None:
    torch.manual_seed(0)
    merged = torch.randn(5, 4 * 64 + 2 * 64 + 2 * 64, device=device)
    query, key, value = merged.split([256, 128, 128], 1)
    slots = torch.tensor(SLOTS, dtype=torch.int64, device=device)
    rotary = make_rotary(5, 64, torch.float32)
    rotary = Rotary(rotary.cos.to(device), rotary.sin.to(device))
    caches = [make_cache((64, 64), 2, torch.float32, device) for _ in range(2)]
    heads = (query.view(5, 4, 64), key.view(5, 2, 64), value.view(5, 2, 64))
    first = write_kv(*heads, caches[0], slots, rotary)
    second = write_kv(*(x.contiguous() for x in heads), caches[1], slots, rotary)
    assert torch.equal(first, second)
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    query = torch.zeros(5, 4, 64, device=device)
    kv = make_cache((64, 64), 2, torch.float32, device)
    slots = torch.arange(5, device=device)
    with pytest.raises(ValueError, match="key"):
        write_kv(query, query[:4, :2], query[:, :2], kv, slots)
    with pytest.raises(ValueError, match="slot_mapping"):
        write_kv(query, query[:, :2], query[:, :2], kv, slots[:2])

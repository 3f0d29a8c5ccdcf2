"""Caches of uneven layers and wires for them."""

import torch

from antiphon.kernels import reference
from antiphon.kernels.paged_kv import QUANTISED_LIMITS, PagedKV, WireKV

SHAPES = ((2, 16, 16), (1, 48, 32), (3, 16, 16))  # KV heads, width of K, width of V


def make_layers(
    dtype: torch.dtype, block_size: int, device: torch.device, slots: torch.Tensor
) -> list[PagedKV]:
    """Layers with random KV in ``slots`` and NaN everywhere else."""
    layers = []
    num_blocks = int(slots.max()) // block_size + 2 if slots.numel() else 2
    for heads, k_dim, v_dim in SHAPES:
        nan = float("nan")
        keys, values = (
            torch.full((num_blocks, block_size, heads, dim), nan, device=device).to(dtype)
            for dim in (k_dim, v_dim)
        )
        scales = [
            torch.full((num_blocks, heads, block_size), nan, device=device)
            if dtype in QUANTISED_LIMITS
            else None
            for _ in range(2)
        ]
        layer = PagedKV(keys, values, *scales)
        key, value = (
            torch.randn(slots.numel(), heads, dim, device=device) for dim in (k_dim, v_dim)
        )
        if slots.numel():
            reference.write_kv(key, key, value, layer, slots)
        layers.append(layer)
    return layers


def make_wire(dtype: torch.dtype, num_tokens: int, device: torch.device) -> WireKV:
    """An empty wire for the layers of ``make_layers``."""
    num_elements = num_tokens * sum(h * (k + v) for h, k, v in SHAPES)
    elements = torch.zeros(num_elements, device=device).to(dtype)
    if dtype not in QUANTISED_LIMITS:
        return WireKV(elements)
    return WireKV(elements, torch.zeros(num_tokens * sum(2 * h for h, _, _ in SHAPES)).to(device))


def assert_same_wire(actual: WireKV, expected: WireKV) -> None:
    """Element for element; requantised scales may differ in the last bit."""
    assert torch.equal(actual.elements.float(), expected.elements.float())
    if expected.scales is not None:
        assert actual.scales is not None
        torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-6, atol=0)

"""One layer's KV cache, its quantised formats, and their canonical form on the wire.

A quantised cache keeps one float32 scale per token and head beside the elements:
``value = element * scale`` with ``scale = max|value| / limit``, so a token is quantised as it is
written and never again. int8 rounds half to even; fp8 is e4m3, its largest finite value the limit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest magnitude of an element, by quantised dtype.
QUANTISED_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, slots=True)
class PagedKV:
    """K and V of one layer in the paged cache.

    Attributes:
        keys: ``[num_blocks, block_size, num_kv_heads, k_head_dim]``, contiguous for the Triton
            kernels, and for the torch ops within each block (``slot_rows``).
        values: ``[num_blocks, block_size, num_kv_heads, v_head_dim]``, in the same way.
        key_scales: ``[num_blocks, num_kv_heads, block_size]`` float32 if the dtype is quantised,
            else None. A block's scales of one head lie together because a kernel reads them so.
        value_scales: As ``key_scales``.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V."""
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class WireKV:
    """KV of some tokens in canonical order: layer by layer, K before V, token by token.

    Attributes:
        elements: 1-D, in the wire dtype: for each layer ``[tokens, num_kv_heads, k_head_dim]`` of
            K, then ``[tokens, num_kv_heads, v_head_dim]`` of V.
        scales: 1-D float32 in the same order, ``[tokens, num_kv_heads]`` for each K and each V,
            if the wire dtype is quantised, else None.
    """

    elements: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embedding of a packed batch, for the variant that rotates halves (GPT-NeoX, Llama).

    The first ``rotary_dim`` elements of a head are rotated, the rest passes through.

    Attributes:
        cos: ``[num_tokens, rotary_dim]``, both halves filled, as transformers computes it.
        sin: As ``cos``.
    """

    cos: Tensor
    sin: Tensor


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise each row of the last dimension.

    Args:
        x: ``[..., head_dim]``, any float dtype.
        dtype: A key of ``QUANTISED_LIMITS``.

    Returns:
        Elements ``[..., head_dim]`` in ``dtype``, and float32 scales ``[...]``. A row of zeros has
        scale 0 and zero elements.
    """
    limit = QUANTISED_LIMITS[dtype]
    x = x.float()
    scales = x.abs().amax(-1) / limit
    # The largest element may come out a rounding above the limit, which fp8 turns into NaN.
    elements = (x / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).clamp(
        -limit, limit
    )
    if dtype == torch.int8:
        elements = elements.round()
    return elements.to(dtype), scales


def dequantise(elements: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert ``quantise``: ``[..., head_dim]`` times ``[...]``."""
    return (elements.float() * scales[..., None]).to(dtype)

"""Torch twins of the ops that replace modules of a model; bit for bit what they replace."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Normalise the last dimension of ``x`` in float32 and scale it.

    Args:
        x: ``[..., hidden_size]``, any float dtype.
        weight: ``[hidden_size]``.
        eps: Added to the mean square.
        unit_offset: Scale by ``1 + weight`` in float32 before rounding (Gemma); otherwise round
            first and scale then (Llama).

    Returns:
        As ``x``.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise the sum; returns the normalised sum, and the sum."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[..., 2 * size]``, gate first: ``[..., size]``."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up

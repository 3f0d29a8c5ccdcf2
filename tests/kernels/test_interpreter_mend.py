"""The mended interpreter against torch: casts round to nearest even, bfloat16 stays bfloat16."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreter


@triton.jit
def _cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    # grid: (1,)
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, dot_ptr, sum_ptr, SIZE: tl.constexpr):
    # grid: (1,)
    rows = tl.arange(0, SIZE)
    square = rows[:, None] * SIZE + rows[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    tl.store(dot_ptr + square, tl.dot(a, b))
    tl.store(sum_ptr + square, a * b + a)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_casts_round_to_nearest_even(target: torch.dtype, device: torch.device) -> None:
    x = torch.linspace(-440, 440, 1024, device=device)
    y = torch.empty(1024, dtype=target, device=device)
    _cast_kernel[(1,)](x, y, SIZE=1024)
    assert torch.equal(y.float(), x.to(target).float())
    back = torch.empty(1024, device=device)
    _cast_kernel[(1,)](y, back, SIZE=1024)
    assert torch.equal(back, y.float())


def test_bfloat16_dots_and_products(device: torch.device) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, device=device).bfloat16() for _ in range(2))
    dot, total = torch.empty(16, 16, device=device), torch.empty_like(a)
    _dot_kernel[(1,)](a, b, dot, total, SIZE=16)
    torch.testing.assert_close(dot, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        total.float(), a.float() * b.float() + a.float(), rtol=8e-3, atol=8e-3
    )

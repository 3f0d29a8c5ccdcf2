"""RMSNorm against its torch twin, on a GPU or in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.kernels import reference
from antiphon.kernels.rms_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.interpreter
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(1, 64), (3, 577), (2, 2, 8192), (0, 64)]


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, residual = (torch.randn(shape).to(device, dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1]).to(device, dtype)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, unit_offset: bool, device: torch.device
) -> None:
    x, _, weight = tensors(shape, dtype, device)
    expected = reference.rms_norm(x, weight, 1e-6, unit_offset)
    actual = rms_norm(x, weight, 1e-6, unit_offset)
    torch.testing.assert_close(actual, expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_and_its_norm_equal_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x, residual, weight = tensors(shape, dtype, device)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 5),
    hidden_size=st.integers(1, 700),
    dtype=st.sampled_from(list(BOUNDS)),
    unit_offset=st.booleans(),
)
def test_random_shapes_against_float64(
    num_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    unit_offset: bool,
    device: torch.device,
) -> None:
    x, _, weight = tensors((num_tokens, hidden_size), dtype, device)
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed * (weight.double() + unit_offset)
    actual = rms_norm(x, weight, 1e-6, unit_offset).double()
    torch.testing.assert_close(actual, expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def test_strided_rows(device: torch.device) -> None:
    x, _, weight = tensors((5, 64), torch.float32, device)
    wide = torch.cat([x, x + 1], 1)[:, :64]
    assert torch.equal(rms_norm(wide, weight, 1e-6), rms_norm(x, weight, 1e-6))


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    x, residual, weight = tensors((5, 64), torch.float32, device)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, weight[:32], 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, residual[:2], weight, 1e-6)

"""The gate of an MLP against its torch twin, on a GPU or in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.kernels import reference
from antiphon.kernels.silu_and_mul import silu_and_mul

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2050), (2, 2, 96), (0, 64)], ids=str)
def test_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, bound: float, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 20).to(device, dtype)
    torch.testing.assert_close(silu_and_mul(x), reference.silu_and_mul(x), rtol=bound, atol=bound)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 4),
    size=st.integers(1, 1500),
    dtype_bound=st.sampled_from(
        [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
    ),
)
def test_random_shapes_against_float64(
    num_tokens: int, size: int, dtype_bound: tuple[torch.dtype, float], device: torch.device
) -> None:
    torch.manual_seed(0)
    dtype, bound = dtype_bound
    x = (torch.randn(num_tokens, 2 * size) * 5).to(device, dtype)
    gate, up = x.double().chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(silu_and_mul(x).double(), expected, rtol=bound, atol=bound)


def test_strided_rows(device: torch.device) -> None:
    wide = torch.randn(4, 96, device=device)
    assert torch.equal(silu_and_mul(wide[:, :64]), silu_and_mul(wide[:, :64].contiguous()))


def test_an_odd_width_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="7"):
        silu_and_mul(torch.zeros(2, 7, device=device))

import pytest
import torch
from torch import nn

from antiphon.workers.few_rows import linear, patch_linears


@pytest.mark.parametrize("num_rows", range(9))
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_a_linear_layer(num_rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(1, num_rows, 33, generator=generator).to(dtype)
    weight = torch.randn(17, 33, generator=generator).to(dtype)
    bias = torch.randn(17, generator=generator).to(dtype) if has_bias else None
    out = linear(x, weight, bias)
    torch.testing.assert_close(out, nn.functional.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    assert out.is_contiguous()


def test_leading_dimensions_are_kept() -> None:
    x, weight = torch.randn(2, 1, 2, 8), torch.randn(3, 8)
    assert linear(x, weight).shape == (2, 1, 2, 3)
    assert linear(x[0, 0, 0], weight).shape == (3,)
    strided = torch.randn(8, 3).t()  # [3, 8], rows apart by 1
    torch.testing.assert_close(linear(strided, weight), nn.functional.linear(strided, weight))


def test_layers_of_a_model_are_patched_in_place_and_their_kin_is_not() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Scaled(8, 8), nn.Linear(8, 2))
    x = torch.randn(3, 8)
    with torch.inference_mode():
        expected = model(x)
        assert patch_linears(model) == patch_linears(model) == 2
        torch.testing.assert_close(model(x), expected)
        model[0].weight.zero_()
        assert not torch.allclose(model(x), expected)  # the weights are read, not copied

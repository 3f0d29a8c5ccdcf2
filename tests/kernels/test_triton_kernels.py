"""What the Triton ops take for a model; what they compute is tested op by op."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_case import AttentionCase
from decode_case import PLAIN

from antiphon.errors import ConfigError
from antiphon.kernels.kernel_set import AttentionShape
from antiphon.kernels.triton_kernels import TritonKernels
from antiphon.kernels.tuning import TABLE, tuning_for
from antiphon.workers.kv_cache import KVLayout, LayerLayout
from antiphon.workers.model_runner import ModelRunner

CPU = torch.device("cpu")
CACHE_DTYPES = (torch.int8, torch.bfloat16, torch.float32)


def tile_rows(dtype: torch.dtype, cache_dtype: torch.dtype, target: str) -> int:
    """Query rows of a tile of prefill attention, heads of 64."""
    kernels = TritonKernels(tuning_for(target, "prefill"), 132)
    kernels.prepare(AttentionShape(8, 4, 64, dtype, cache_dtype))
    plan = kernels.make_batch([[0]], [0], [2], 16, CPU).plan
    assert plan is not None
    assert plan.prefill is not None
    return plan.prefill.block_m


@pytest.mark.parametrize("target", sorted({tuning.target for tuning in TABLE}))
def test_a_float32_model_takes_small_tiles_whatever_its_cache_holds(target: str) -> None:
    assert [tile_rows(torch.float32, dtype, target) for dtype in CACHE_DTYPES] == [16, 16, 32]
    assert tile_rows(torch.bfloat16, torch.int8, target) == 128


def test_a_float32_model_with_wide_heads_and_a_smaller_cache_is_refused() -> None:
    kernels = TritonKernels(tuning_for("sm_90", "decode"), 132)
    with pytest.raises(ConfigError, match=r"float32 model with heads of 128 .* model\.dtype: bfl"):
        kernels.prepare(AttentionShape(8, 4, 80, torch.float32, torch.int8))
    kernels.prepare(AttentionShape(8, 4, 80, torch.float32, torch.float32))


def test_heads_that_are_too_wide_are_not_blamed_on_the_cache() -> None:
    kernels = TritonKernels(tuning_for("sm_90", "decode"), 132)
    with pytest.raises(ConfigError, match=r"heads of 512 .* for heads of up to 256; engine\."):
        kernels.prepare(AttentionShape(1, 8, 512, torch.bfloat16, torch.bfloat16))


@pytest.mark.interpreter
def test_layers_may_have_fewer_kv_heads_than_others(device: torch.device) -> None:
    """Each of these has more query heads, which take more rows of a tile."""
    layers = (LayerLayout(2, 64, 64), LayerLayout(1, 64, 64))
    layout = KVLayout(layers, torch.float32, torch.float32)
    kernels = TritonKernels(tuning_for("sm_90", "decode"), 2)
    model: Any = SimpleNamespace(kernels=kernels, num_q_heads=4, layout=layout)
    cache: Any = SimpleNamespace(layout=layout)
    ModelRunner(model, cache)
    for layer in layers:
        case = AttentionCase([(20, 1), (30, 1)], heads=(4, layer.num_kv_heads), device=device)
        batch = kernels.make_batch(case.tables, [20, 30], [1, 1], case.block_size, device)
        actual = kernels.paged_attention(case.query(0, 2), case.kv, batch, PLAIN)
        error = (actual.cpu().double() - case.expected(PLAIN, 0, 2)).abs().max()
        assert float(error) <= case.bound()

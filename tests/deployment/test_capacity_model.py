"""One GPU's memory and times, held against sums made by hand, and the data sheets behind them."""

from dataclasses import replace

import pytest
from planned_model import LLAMA_8B, ROUND, ROUND_SHAPE, llama
from targets import TARGETS

from antiphon.config import RouterConfig
from antiphon.deployment.capacity_model import Assumptions, Formats, GpuModel, kv_bytes_per_token
from antiphon.deployment.gpus import GPUS, TUNED, find_gpu
from antiphon.errors import ConfigError
from antiphon.kernels import tuning
from antiphon.workers import memory_plan, start


def test_kv_of_a_token() -> None:
    assert kv_bytes_per_token(LLAMA_8B, "bfloat16") == 2 * 32 * 8 * 128 * 2 == 131_072
    assert kv_bytes_per_token(LLAMA_8B, "float32") == 262_144
    # One scale of 4 bytes for K and one for V, for each of 8 heads in 32 layers.
    assert kv_bytes_per_token(LLAMA_8B, "int8") == 65_536 + 2 * 8 * 32 * 4
    assert kv_bytes_per_token(LLAMA_8B, "fp8") == kv_bytes_per_token(LLAMA_8B, "int8")


def test_memory_is_divided_as_by_hand() -> None:
    memory = llama("H100").memory()
    assert memory.weights == 16_060_522_496
    # (80e9 - 1.5e9 - 16,060,522,496) * 0.85
    assert memory.kv_cache == pytest.approx(53_073_555_878.4)
    assert memory.activations == pytest.approx(9_365_921_625.6)
    assert memory.kv_tokens == 404_919


def test_a_decode_step_reads_weights_and_contexts_once() -> None:
    model = llama("H100")
    # Twice (8,030,261,248 - 525,336,576) for weights, 1,152 * 131,072 of KV for each request.
    assert model.decode_step_bytes(1, 1152) == 15_009_849_344 + 150_994_944
    assert model.decode_step_bytes(10, 1152) == 15_009_849_344 + 1_509_949_440
    # 15,160,844,288 bytes at 0.7 * 3.35 TB/s are 6.465 ms; 2 ms more.
    assert model.decode_step_seconds(1, 1152) == pytest.approx(8.46518e-3, rel=1e-5)


def test_a_large_batch_is_limited_by_arithmetic() -> None:
    model = llama("H100", step_overhead_seconds=0.0)
    # 1,000 * 2 * 7,504,924,672 FLOP at 0.5 * 989 TFLOP/s are 30.4 ms, 15 GB 6.4 ms.
    assert model.decode_step_seconds(1000, 0) == pytest.approx(30.353e-3, rel=1e-4)


def test_prefill_makes_no_logits_and_attends_to_what_came_before() -> None:
    model = llama("H100")
    # 2 * 1,000 * 6,979,588,096, and 500,000 pairs of 2 * 32 * (128 + 128) * 32 FLOP.
    flops = 13_959_176_192_000 + 500_000 * 524_288
    assert model.prefill_flops(1000) == flops
    assert model.prefill_seconds(1000) == pytest.approx(flops / 494.5e12 + 0.002)
    assert model.num_prefill_steps(2048) == 1
    assert model.num_prefill_steps(2049) == 2


def test_a_short_prompt_waits_for_the_weights() -> None:
    model = llama("H100", step_overhead_seconds=0.0)
    assert model.prefill_seconds(2) == pytest.approx(15_009_849_344 / 2.345e12)


def test_float32_weights_take_twice_the_memory_and_the_slower_units() -> None:
    wide = GpuModel(LLAMA_8B, GPUS["H100"], Formats("float32", "bfloat16", "auto"), Assumptions())
    assert wide.memory().weights == 32_121_044_992
    assert wide.flops_per_second == 67e12


def test_experts_are_read_as_far_as_some_token_uses_them() -> None:
    shape = replace(ROUND_SHAPE, num_expert_parameters=400_000_000, expert_share=0.25)
    model = replace(ROUND, shape=shape)
    assert shape.num_active_parameters == 100_000_000 + 100_000_000
    assert model.memory().weights == 1e9  # all of them are held
    assert model.decode_step_bytes(1, 0) == pytest.approx(2 * 200_000_000)
    assert model.decode_step_bytes(2, 0) == pytest.approx(2 * (100e6 + 400e6 * (1 - 0.75**2)))
    assert model.decode_step_bytes(1000, 0) == pytest.approx(1e9)


def test_gpus_are_found_by_name_and_unknown_ones_refused() -> None:
    assert find_gpu("h100") is GPUS["H100"]
    with pytest.raises(
        ConfigError, match="'H800'; known are A100-80, H100, H200, B200, MI300X, L40S"
    ):
        find_gpu("H800")


def test_figures_that_stand_elsewhere_too_are_the_same() -> None:
    products = {"sm_80": "A100-80", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X"}
    for name, target in TARGETS.items():
        gpu = GPUS[products[name]]
        assert gpu.architecture == name
        assert (gpu.bytes_per_second, gpu.flops_16_bit) == (
            target.dram_bytes_per_second,
            target.tensor_flops,
        )
    assert {row.target for row in tuning.TABLE} == TUNED
    values = Assumptions()
    assert values.kv_share == memory_plan._GPU_SHARE
    assert values.step_tokens == start._MAX_BATCH_TOKENS["cuda"]
    assert values.link_bytes_per_second == RouterConfig().link_bytes_per_second

"""Models and GPUs for tests of the planner: one that people know, one with round numbers."""

from dataclasses import replace

from antiphon.deployment.capacity_model import Assumptions, Formats, GpuModel
from antiphon.deployment.capacity_pools import Demand
from antiphon.deployment.gpus import GPUS, Gpu
from antiphon.workers.model_shape import LayerShape, ModelShape

LLAMA_8B = ModelShape(
    family="llama",
    dtype="bfloat16",
    max_context_tokens=8192,
    num_parameters=8_030_261_248,
    num_lookup_parameters=128_256 * 4096,
    num_output_parameters=128_256 * 4096,
    num_expert_parameters=0,
    expert_share=1.0,
    layers=(LayerShape(32, 8, 128, 128),) * 32,
)
BF16 = Formats("bfloat16", "bfloat16", "bfloat16")
# 1 GB of weights, 1 MB of KV per token, 1 MFLOP per pair of tokens; 1 TB/s, 10 TFLOP/s.
ROUND_SHAPE = ModelShape(
    family="round",
    dtype="bfloat16",
    max_context_tokens=10_000,
    num_parameters=500_000_000,
    num_lookup_parameters=0,
    num_output_parameters=0,
    num_expert_parameters=0,
    expert_share=1.0,
    layers=(LayerShape(250, 250, 1000, 1000),),
)
ROUND_GPU = Gpu("round", "invented", "sm_90", 12e9, 1e12, 10e12, 1e12)
IDEAL = Assumptions(
    compute_share=1.0,
    memory_share=1.0,
    utilisation=0.5,
    step_overhead_seconds=0.0,
    request_overhead_seconds=0.0,
    runtime_bytes=1e9,
    kv_share=0.8,
    link_bytes_per_second=10e9,
    step_tokens=100,
)
ROUND = GpuModel(ROUND_SHAPE, ROUND_GPU, BF16, IDEAL)
DEMAND = Demand(
    ttft_seconds=0.5,
    tpot_seconds=0.05,
    requests_per_second=10,
    prompt_tokens=1024,
    output_tokens=256,
)


def llama(gpu: str, **changes: float) -> GpuModel:
    return GpuModel(LLAMA_8B, GPUS[gpu], BF16, replace(Assumptions(), **changes))

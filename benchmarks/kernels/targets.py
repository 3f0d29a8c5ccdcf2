"""What the roofline and the compile tests must know of each GPU.

Shared memory, registers and warps are from the CUDA C++ programming guide's table of compute
capabilities and AMD's CDNA 3 architecture guide; bandwidth, multiprocessors and dense tensor peaks
from the vendors' data sheets: A100 SXM 80 GB, H100 SXM, B200, MI300X.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture and the product that stands for it.

    Attributes:
        name: As in the tuning table.
        product: Whose data sheet the figures are from.
        backend: Triton's.
        arch: Triton's.
        warp_size: Threads of a warp.
        shared_limit_bytes: Most that one block may ask for.
        shared_bytes_per_sm: Shared by resident blocks.
        registers_per_sm: 32-bit registers.
        max_warps_per_sm: Resident.
        num_sms: Multiprocessors or compute units.
        dram_bytes_per_second: Peak.
        tensor_flops: Peak dense bf16 with float32 accumulation.
        latency_seconds: Of a load from DRAM, about; microbenchmarks in arXiv:2402.13499 for NVIDIA,
            estimates for the others.
        clock_hz: At which the tensor peak is stated.
        fp32_lanes: Simple float32 operations of a multiprocessor per cycle.
        special_lanes: Exponentials of a multiprocessor per cycle.
    """

    name: str
    product: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit_bytes: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    max_warps_per_sm: int
    num_sms: int
    dram_bytes_per_second: float
    tensor_flops: float
    latency_seconds: float
    clock_hz: float
    fp32_lanes: int
    special_lanes: int


TARGETS = {
    target.name: target
    for target in (
        Target(
            "sm_80", "A100 SXM 80 GB", "cuda", 80, 32, 166_912, 167_936, 65_536, 64, 108,
            2.039e12, 312e12, 0.45e-6, 1.41e9, 64, 16,
        ),
        Target(
            "sm_90", "H100 SXM", "cuda", 90, 32, 232_448, 233_472, 65_536, 64, 132,
            3.35e12, 989e12, 0.5e-6, 1.755e9, 128, 16,
        ),
        Target(
            "sm_100", "B200", "cuda", 100, 32, 232_448, 233_472, 65_536, 64, 148,
            8.0e12, 2250e12, 0.6e-6, 1.85e9, 128, 16,
        ),
        Target(
            # 512 vector registers per lane and SIMD, four SIMDs: 4 * 64 * 512.
            "gfx942", "MI300X", "hip", "gfx942", 64, 65_536, 65_536, 131_072, 32, 304,
            5.3e12, 1307e12, 0.7e-6, 2.1e9, 128, 16,
        ),
    )
}  # fmt: skip

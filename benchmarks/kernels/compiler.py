"""Compiles kernels for GPUs that are not here, through their real launchers, and reads the result.

Triton asks its driver for the target; a driver that only answers that question makes every launch a
compilation, specialised exactly as the launch would be. Registers, spills and shared memory come
from the assembler's own report, instructions from the assembly. The interpreter must be off.
"""

import os

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # its default changes in a later Triton

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from targets import Target
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_PTX = {
    "mma": r"\bmma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "cp_async": r"cp\.async\.c[ag]\.shared",
    "tma": r"cp\.async\.bulk",
    "load_128": r"ld\.global[^;]*\.v4\.b32|ld\.global[^;]*\.v2\.b64|cp\.async\.cg\.shared",
    "store_128": r"st\.global[^;]*\.v4\.b32|st\.global[^;]*\.v2\.b64",
    "load": r"\bld\.global",
    "store": r"\bst\.global",
}
_GCN = {
    "mfma": r"v_mfma",
    "load_128": r"(global|buffer)_load_dwordx4",
    "store_128": r"(global|buffer)_store_dwordx4",
    "load": r"(global|buffer)_load",
    "store": r"(global|buffer)_store",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as compiled.

    Attributes:
        kernel: Name of the jitted function.
        registers: Per thread.
        spill_bytes: Per thread, stores and loads.
        shared_bytes: Per block.
        num_warps: Per block.
        instructions: How often the assembly has each kind that it has.
    """

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: dict[str, int]


class _TargetDriver(DriverBase):  # type: ignore[misc]
    """Answers what Triton asks before a launch; launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing runs here")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        raise RuntimeError("nothing runs here")

    def clear_cache(self, cache: torch.Tensor) -> None:
        raise RuntimeError("nothing runs here")


def use_target(target: Target) -> None:
    """Make every launch of this process a compilation for ``target``."""
    driver.set_active(_TargetDriver(GPUTarget(target.backend, target.arch, target.warp_size)))
    JITFunction.run = _compile_only


_run = JITFunction.run
_captured: list[tuple[str, Any]] = []


def _compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    _captured.append((self.fn.__name__, kernel))
    return kernel


def compile_launch(launch: Callable[[], object], target: Target) -> list[Compiled]:
    """Every kernel that a launcher launches."""
    _captured.clear()
    launch()
    return [_read(name, kernel, target) for name, kernel in _captured]


def _read(name: str, kernel: Any, target: Target) -> Compiled:
    metadata = kernel.metadata
    if target.backend == "cuda":
        registers, spilled = _assemble(kernel.asm["ptx"], int(target.arch))
        assembly, patterns = kernel.asm["ptx"], _PTX
    else:
        assembly, patterns = kernel.asm["amdgcn"], _GCN
        # Accumulation registers come out of the same file.
        registers = _amd_field(assembly, "vgpr_count") + _amd_field(assembly, "agpr_count")
        spilled = 4 * _amd_field(assembly, "vgpr_spill_count")
    counts = {key: len(re.findall(pattern, assembly)) for key, pattern in patterns.items()}
    return Compiled(
        kernel=name.strip("_").removesuffix("_kernel"),
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=int(metadata.shared),
        num_warps=int(metadata.num_warps),
        instructions={key: count for key, count in counts.items() if count},
    )


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes per thread, as NVIDIA's assembler reports them."""
    tool = _NVIDIA_TOOLS / ("ptxas-blackwell" if arch >= 90 else "ptxas")
    name = f"sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={name}", source, "-o", Path(folder, "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas reported no registers: {report}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def _amd_field(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if found is None:
        raise RuntimeError(f"the assembly states no {name}")
    return int(found[1])

"""Times kernels on a GPU, and says so where there is none."""

import importlib.metadata
import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import describe_machine
from targets import TARGETS, Target

_FLUSH_BYTES = 512 * 2**20  # more than any second-level cache
_WARMUPS, _REPEATS = 10, 50


def require_gpu() -> torch.device:
    """Return the device, or leave with a word on why nothing is timed."""
    if not torch.cuda.is_available():
        print("no GPU here: nothing to time. compile_report.py and roofline.py need none.")
        sys.exit(0)
    return torch.device("cuda")


def print_environment() -> Target | None:
    """Print machine, GPU and versions; return the target's peaks if they are known."""
    properties = torch.cuda.get_device_properties(0)
    for key, value in describe_machine().items():
        print(f"{key:<14} {value}")
    triton, flashinfer = (
        importlib.metadata.version(name) if importlib.util.find_spec(module) else "not installed"
        for name, module in (("triton", "triton"), ("flashinfer-python", "flashinfer"))
    )
    print(f"{'gpu':<14} {properties.name}, triton {triton}, flashinfer {flashinfer}\n")
    name = (
        properties.gcnArchName.split(":")[0]
        if torch.version.hip
        else f"sm_{properties.major}{properties.minor}"
    )
    return TARGETS.get(name)


def seconds(function: Callable[[], object]) -> float:
    """Median time on the device, with a cold second-level cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for index in range(_WARMUPS + _REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if index >= _WARMUPS:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def report(
    label: str,
    functions: Mapping[str, Callable[[], object]],
    *,
    num_bytes: float = 0.0,
    num_flops: float = 0.0,
    peak: Target | None = None,
) -> None:
    """Time ours and its baselines side by side and print rate and share of the peak."""
    for name, function in functions.items():
        taken = seconds(function)
        if num_flops:
            rate, unit = num_flops / taken / 1e12, "TFLOP/s"
            share = num_flops / taken / peak.tensor_flops if peak else None
        else:
            rate, unit = num_bytes / taken / 1e9, "GB/s"
            share = num_bytes / taken / peak.dram_bytes_per_second if peak else None
        of_peak = "" if share is None else f"{share:>7.1%} of peak"
        print(f"{label:<36}{name:<14}{taken * 1e6:>10.1f} us{rate:>10.1f} {unit}{of_peak}")

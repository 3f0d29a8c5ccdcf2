"""What the compiler makes of every kernel in every configuration, for GPUs that are not here.

    python benchmarks/kernels/compile_report.py [--json] [--markdown] [--target sm_90 ...]

Exits with 1 if a row breaks a requirement: no spills, shared memory within the target's limit,
registers and shared memory that allow the occupancy which the configuration names, tensor cores
where there is a product (wgmma for the prefill pool on sm_90), asynchronous copies and 128-bit
accesses for K and V. This says what was compiled; nothing here has been run.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from targets import TARGETS, Target

ATTENTION = {"prefill_attention", "decode_attention", "shared_prefix_attention"}
_TENSOR_CORES = {"mma", "wgmma", "tcgen05", "mfma"}
ELEMENT_BYTES = {"bf16": 2, "int8": 1, "fp8": 1, "fp32": 4}
_RESERVED_SHARED_BYTES = 1024  # of every block, by the driver
TIMEOUT_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel, configuration and target."""

    kernel: str
    target: str
    config: str
    shape: str
    role: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    num_warps: int
    min_ctas_per_sm: int
    has_dot: bool
    instructions: dict[str, int]

    @property
    def ctas_per_sm(self) -> int:
        """Blocks that registers, shared memory and warps allow at once."""
        target = TARGETS[self.target]
        threads = self.num_warps * target.warp_size
        return min(
            target.registers_per_sm // (max(self.registers, 1) * threads),
            target.shared_bytes_per_sm // (self.shared_bytes + _RESERVED_SHARED_BYTES)
            if target.backend == "cuda"
            else target.shared_bytes_per_sm // max(self.shared_bytes, 1),
            target.max_warps_per_sm // self.num_warps,
        )

    @property
    def wide_loads_of_a_tile(self) -> int:
        """128-bit loads of a thread that bring in one tile of K and V."""
        tile = numbers(self.config)[1 if "x" in self.config else 0]
        dim, dtypes = self.shape.split()[:2]
        padded = 1 << (int(dim) - 1).bit_length()
        num_bytes = 2 * tile * padded * ELEMENT_BYTES[dtypes.split("/")[1]]
        return math.ceil(num_bytes / (16 * self.num_warps * TARGETS[self.target].warp_size))


def numbers(config: str) -> list[int]:
    """``128x64, 8 warps, 2 stages`` and ``64, 4 warps, 3 stages`` as numbers."""
    words = config.replace("x", " ").replace(",", " ").split()
    return [int(word) for word in words if word.isdigit()]


def problems(row: Row) -> list[str]:
    """What a row breaks, in words."""
    found = []
    kinds = row.instructions.keys()
    if row.spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes")
    if row.shared_bytes > row.shared_limit_bytes:
        found.append(f"{row.shared_bytes} bytes of shared memory exceed {row.shared_limit_bytes}")
    if row.ctas_per_sm < row.min_ctas_per_sm:
        found.append(f"{row.ctas_per_sm} blocks fit a multiprocessor, not {row.min_ctas_per_sm}")
    if row.kernel in ATTENTION:
        if row.has_dot and not kinds & _TENSOR_CORES:
            found.append("uses no tensor cores")
        wants_wgmma = row.kernel == "prefill_attention" and row.role == "prefill"
        if row.has_dot and wants_wgmma and row.target == "sm_90" and "wgmma" not in kinds:
            found.append("uses no wgmma")
        if TARGETS[row.target].backend == "cuda" and not kinds & {"cp_async", "tma"}:
            found.append("copies nothing asynchronously")
        wide = row.instructions.get("load_128", 0)
        if wide < row.wide_loads_of_a_tile:
            found.append(f"has {wide} 128-bit loads, K and V of a tile {row.wide_loads_of_a_tile}")
    return found


def compile_target(target: Target) -> list[Row]:
    """Compile everything for one target, in this process, which can then do nothing else."""
    import compiler
    from launches import launches

    from antiphon.kernels.tuning import tuning_for

    compiler.use_target(target)
    fp8 = target.name != "sm_80"  # e4m3 conversions came with sm_89
    rows: dict[tuple[str, str, str, str], Row] = {}
    pools = (tuning_for(target.name, "prefill"), tuning_for(target.name, "decode"))
    for launch in launches(*pools, fp8=fp8):
        for compiled in compiler.compile_launch(launch.run, target):
            config, least = launch.config, launch.min_ctas_per_sm
            if launch.op == "decode_attention":
                own, _, shared = launch.config.partition("; shared ")
                is_shared = compiled.kernel == "shared_prefix_attention"
                config, least = (shared, 1) if is_shared else (own, least)
            if compiled.kernel == "merge_parts":
                config, least = "-", 1
            row = Row(
                kernel=compiled.kernel,
                target=target.name,
                config=config,
                shape=launch.shape,
                role=launch.role,
                registers=compiled.registers,
                spill_bytes=compiled.spill_bytes,
                shared_bytes=compiled.shared_bytes,
                shared_limit_bytes=target.shared_limit_bytes,
                num_warps=compiled.num_warps,
                min_ctas_per_sm=least,
                has_dot=launch.has_dot,
                instructions=compiled.instructions,
            )
            rows.setdefault((row.kernel, row.config, row.shape, row.role), row)
    return list(rows.values())


def compile_all(names: Sequence[str]) -> list[Row]:
    """Compile for several targets, two at a time, each in a process of its own.

    Raises:
        RuntimeError: A compilation failed; with what it said.
    """

    def one(name: str) -> list[Row]:
        command = [sys.executable, __file__, "--in-process", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-4000:]}")
        return [Row(**fields) for fields in json.loads(done.stdout)]

    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(one, names) for row in rows]


def render(rows: Sequence[Row], *, markdown: bool) -> str:
    """The table."""
    titles = ("kernel", "target", "shape", "config", "regs", "shared", "blocks/SM", "instructions")
    cells: list[tuple[str, ...]] = [titles]
    for row in rows:
        instructions = " ".join(f"{kind}:{n}" for kind, n in row.instructions.items())
        cells.append(
            (
                row.kernel, row.target, row.shape, row.config, str(row.registers),
                str(row.shared_bytes), str(row.ctas_per_sm), instructions,
            )
        )  # fmt: skip
    if markdown:
        cells.insert(1, ("---",) * len(titles))
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
        for line in cells
    )


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--target", nargs="*", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--in-process", choices=sorted(TARGETS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        rows: list[Any] = compile_target(TARGETS[options.in_process])
        print(json.dumps([asdict(row) for row in rows]))
        return
    rows = compile_all(options.target)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(render(rows, markdown=options.markdown))
    bad = [(row, what) for row in rows for what in problems(row)]
    for row, what in bad:
        print(f"{row.kernel} ({row.config}; {row.shape}) on {row.target}: {what}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

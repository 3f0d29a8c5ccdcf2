"""How much of a GPU's peak each configuration can reach: a model, not a measurement.

    python benchmarks/kernels/compile_report.py --json > rows.json
    python benchmarks/kernels/roofline.py rows.json [--json] [--markdown]

Decode (batch 32, context 4,096) is bound by memory. The model takes the plan that the worker would
make, the bytes that it moves, how evenly it fills the multiprocessors, and by Little's law whether
the loads in flight, as registers and shared memory allow them, cover the latency of memory.

Prefill (one prompt of 4,096 tokens) is bound by tensor cores. The model counts the products that
are computed, masked ones included, and beside them exponentials and other float32 work. Whether
that work hides behind the products depends on scheduling that no count can tell, so there are two
figures: all of it hidden, which is the most that can be reached, and none of it hidden.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from compile_report import ELEMENT_BYTES, Row, numbers
from launches import KV_HEADS, Q_HEADS
from targets import TARGETS, Target

from antiphon.kernels.decode_plan import DecodeCapacity, plan_decode
from antiphon.kernels.prefill_plan import plan_prefill

BATCH, CONTEXT, HEAD_DIM = 32, 4096, 128
LAUNCH_SECONDS = 2e-6  # of a kernel inside a CUDA graph; three of them follow one another
LAUNCHES_PER_STEP = 3
# Float32 operations for each score beside the exponential: scale, maximum, subtraction, sum, cast.
SIMPLE_OPS_PER_SCORE = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a configuration can reach.

    Attributes:
        kernel: Decode or prefill attention.
        target: Architecture.
        config: As in the table.
        shape: Head width and dtypes.
        fraction_of_peak: Of bandwidth for decode, of tensor throughput for prefill; at most.
        fraction_without_overlap: Prefill only: if no float32 work hides behind products.
        limit: What binds.
    """

    kernel: str
    target: str
    config: str
    shape: str
    fraction_of_peak: float
    fraction_without_overlap: float | None
    limit: str


def predict_decode(row: Row, target: Target) -> Prediction:
    """Bandwidth of the decode step, from its plan and the row's occupancy."""
    block_n, _, stages = numbers(row.config)
    size = ELEMENT_BYTES[row.shape.split("/")[1].split()[0]]
    resident = target.num_sms * row.ctas_per_sm
    capacity = DecodeCapacity(
        target.num_sms * row.min_ctas_per_sm // KV_HEADS, block_n, 1, CONTEXT * 2
    )
    tables = [list(range(CONTEXT // 16)) for _ in range(BATCH)]
    plan = plan_decode([CONTEXT] * BATCH, tables, 16, capacity, torch.device("cpu"))
    tiles = _tiles_per_program(plan.items.tolist(), block_n)
    balance = _balance(tiles * KV_HEADS, resident)
    scale_bytes = 4 if size == 1 else 0
    tile_bytes = 2 * block_n * (HEAD_DIM * size + scale_bytes)
    num_tiles = sum(tiles) * KV_HEADS
    partial_bytes = 2 * 4 * len(tiles) * Q_HEADS * (HEAD_DIM + 1)
    moved = num_tiles * tile_bytes + partial_bytes
    # A stage that only fetches block ids ahead has no tile in shared memory.
    per_block = min(max(1, stages - 1) * tile_bytes, row.shared_bytes)
    in_flight = min(resident, len(tiles) * KV_HEADS) * per_block
    covered = min(1.0, in_flight / (target.dram_bytes_per_second * target.latency_seconds))
    seconds = moved / (target.dram_bytes_per_second * covered * balance)
    seconds += LAUNCHES_PER_STEP * LAUNCH_SECONDS
    useful = 2 * BATCH * CONTEXT * KV_HEADS * HEAD_DIM * size
    fraction = useful / target.dram_bytes_per_second / seconds
    limits = {"latency": covered, "balance": balance, "launches and merge": 0.999}
    return Prediction(
        row.kernel, row.target, row.config, row.shape, fraction, None,
        min(limits, key=lambda name: limits[name]),
    )  # fmt: skip


def predict_prefill(row: Row, target: Target) -> Prediction:
    """Tensor throughput of a prompt, from its tiles and the work beside the products."""
    block_m, block_n, *_ = numbers(row.config)
    plan = plan_prefill([CONTEXT], [CONTEXT], 0, block_m, torch.device("cpu"))
    key_tiles = [-(-min(first + block_m, CONTEXT) // block_n) for _, first in plan.tiles.tolist()]
    resident = target.num_sms * row.ctas_per_sm
    balance = _balance([n for n in key_tiles for _ in range(Q_HEADS)], resident)
    scores = block_m * block_n
    flops_per_cycle = target.tensor_flops / target.num_sms / target.clock_hz
    product = 4 * scores * HEAD_DIM / flops_per_cycle
    rescale = block_m * HEAD_DIM / target.fp32_lanes
    simple = SIMPLE_OPS_PER_SCORE * scores / target.fp32_lanes + rescale
    beside = simple + scores / target.special_lanes
    # Two of every pair of key and query positions are computed, masked or not; one counts.
    useful = CONTEXT * (CONTEXT + 1) / 2 / (sum(key_tiles) * scores)
    hidden = useful * balance * product / max(product, beside)
    limit = "float32 work" if beside > product else "masked tiles and balance"
    return Prediction(
        row.kernel, row.target, row.config, row.shape, hidden,
        useful * balance * product / (product + beside), limit,
    )  # fmt: skip


def predict(rows: Sequence[Row]) -> list[Prediction]:
    """All rows of 128-wide heads that the model covers."""
    predictions = []
    for row in rows:
        plain = row.shape.startswith(f"{HEAD_DIM} ") and "features" not in row.shape
        if row.kernel == "decode_attention" and plain:
            predictions.append(predict_decode(row, TARGETS[row.target]))
        if row.kernel == "prefill_attention" and plain and row.shape.endswith("bf16/bf16"):
            predictions.append(predict_prefill(row, TARGETS[row.target]))
    return predictions


def _tiles_per_program(items: list[list[int]], block_n: int) -> list[int]:
    parts = Counter(request for request, *_ in items if request >= 0)
    tiles = []
    for count in parts.values():
        per_part = math.ceil(math.ceil(CONTEXT / count) / block_n)
        left = math.ceil(CONTEXT / block_n)
        for _ in range(count):
            tiles.append(min(per_part, left))
            left -= tiles[-1]
    return tiles


def _balance(work: Sequence[int], resident: int) -> float:
    """Mean over longest load when programs go to the first free of ``resident`` places."""
    loads = [0] * min(resident, len(work))
    for amount in work:
        place = min(range(len(loads)), key=loads.__getitem__)
        loads[place] += amount
    return sum(work) / resident / max(loads) if len(work) > resident else _spread(work, resident)


def _spread(work: Sequence[int], resident: int) -> float:
    """A single wave: bandwidth is shared, so only a device left half empty loses."""
    return min(1.0, sum(work) / max(work) / min(resident, len(work)))


def main() -> None:
    """Print the predictions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="what compile_report.py --json printed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    rows = [Row(**fields) for fields in json.loads(options.rows.read_text())]
    predictions = predict(rows)
    if options.json:
        print(json.dumps([asdict(p) for p in predictions], indent=1))
        return
    titles = ("kernel", "target", "shape", "config", "at most", "if nothing overlaps", "limit")
    lines = [titles, ("---",) * len(titles)] if options.markdown else [titles]
    for p in predictions:
        without = "" if p.fraction_without_overlap is None else f"{p.fraction_without_overlap:.0%}"
        at_most = f"{p.fraction_of_peak:.0%}"
        lines.append((p.kernel, p.target, p.shape, p.config, at_most, without, p.limit))
    for line in lines:
        print(f"| {' | '.join(line)} |" if options.markdown else "  ".join(line))
    print("\nA model, not a measurement: no GPU ran any of this.", file=sys.stderr)


if __name__ == "__main__":
    main()

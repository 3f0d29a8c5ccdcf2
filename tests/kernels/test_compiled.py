"""Every kernel and configuration compiles for every target into what the table promises.

The compiler runs in processes of its own, since it cannot share one with the interpreter.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from compile_report import ATTENTION, Row, problems
from launches import describe
from roofline import predict
from targets import TARGETS

from antiphon.kernels.tuning import TABLE

pytestmark = pytest.mark.compiler
REPORT = Path(__file__).parents[2] / "benchmarks/kernels/compile_report.py"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, REPORT, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.stdout, done.stderr
    return [Row(**fields) for fields in json.loads(done.stdout)]


@pytest.mark.timeout(920)
def test_no_row_breaks_a_requirement(rows: list[Row]) -> None:
    broken = [
        f"{row.kernel} {row.config} {row.shape} on {row.target}: {what}"
        for row in rows
        for what in problems(row)
    ]
    assert not broken, "\n".join(broken)


def test_nothing_of_the_table_is_missing(rows: list[Row]) -> None:
    compiled = defaultdict(set)
    for row in rows:
        compiled[row.target, row.kernel].add(row.config)
    for tuning in TABLE:
        for kernel in ATTENTION:
            configs = {describe(config) for config in getattr(tuning, kernel).values()}
            assert configs <= compiled[tuning.target, kernel], (tuning.target, kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_every_op_is_compiled_for_every_target(target: str, rows: list[Row]) -> None:
    kernels = {row.kernel for row in rows if row.target == target}
    assert kernels == ATTENTION | {
        "merge_parts", "write_kv", "copy_kv", "rms_norm", "silu_and_mul",
    }  # fmt: skip


def test_the_model_says_what_was_aimed_at_on_sm_90(rows: list[Row]) -> None:
    """90 % of bandwidth for decode, 75 % of tensor throughput for the prefill pool: a model."""
    sm_90 = [row for row in rows if row.target == "sm_90"]
    prefill = predict([row for row in sm_90 if row.role == "prefill"])
    decode = predict([row for row in sm_90 if row.kernel == "decode_attention"])
    assert prefill
    assert min(prediction.fraction_of_peak for prediction in prefill) >= 0.75
    assert {prediction.shape for prediction in decode} >= {"128 bf16/bf16", "128 bf16/int8"}
    assert min(prediction.fraction_of_peak for prediction in decode) >= 0.9


GOOD = Row(
    kernel="prefill_attention",
    target="sm_90",
    config="128x64, 8 warps, 2 stages",
    shape="128 bf16/bf16",
    role="prefill",
    registers=200,
    spill_bytes=0,
    shared_bytes=98_304,
    shared_limit_bytes=232_448,
    num_warps=8,
    min_ctas_per_sm=1,
    has_dot=True,
    instructions={"wgmma": 8, "cp_async": 16, "load_128": 16},
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 300_000}, "exceed 232448"),
        ({"min_ctas_per_sm": 2}, "1 blocks fit"),
        ({"instructions": {"cp_async": 1, "load_128": 8}}, "tensor cores"),
        ({"instructions": {"mma": 1, "cp_async": 1, "load_128": 8}}, "no wgmma"),
        ({"instructions": {"wgmma": 1, "load_128": 8}}, "asynchronously"),
        ({"instructions": {"wgmma": 1, "cp_async": 9, "load_128": 7}}, "7 128-bit"),
    ],
)
def test_a_broken_requirement_is_named(change: dict[str, object], problem: str) -> None:
    assert not problems(GOOD)
    fields = {name: getattr(GOOD, name) for name in Row.__dataclass_fields__}
    assert any(problem in found for found in problems(Row(**{**fields, **change})))

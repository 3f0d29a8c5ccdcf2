"""The roofline model: bounded, monotonic, and right where it can be worked out by hand."""

from dataclasses import replace

import pytest
from compile_report import Row
from roofline import predict, predict_decode, predict_prefill
from targets import TARGETS

DECODE = Row(
    kernel="decode_attention",
    target="sm_90",
    config="64, 4 warps, 4 stages",
    shape="128 bf16/bf16",
    role="both",
    registers=126,
    spill_bytes=0,
    shared_bytes=39_168,
    shared_limit_bytes=232_448,
    num_warps=4,
    min_ctas_per_sm=4,
    has_dot=True,
    instructions={},
)
PREFILL = replace(
    DECODE,
    kernel="prefill_attention",
    config="128x128, 8 warps, 2 stages",
    role="prefill",
    registers=248,
    shared_bytes=163_840,
    num_warps=8,
    min_ctas_per_sm=1,
)
H100 = TARGETS["sm_90"]


def test_fractions_are_fractions() -> None:
    for prediction in predict([DECODE, PREFILL]):
        assert 0 < prediction.fraction_of_peak < 1
    prefill = predict_prefill(PREFILL, H100)
    assert prefill.fraction_without_overlap is not None
    assert prefill.fraction_without_overlap < prefill.fraction_of_peak


def test_fewer_loads_in_flight_reach_less_bandwidth() -> None:
    deep = predict_decode(DECODE, H100).fraction_of_peak
    slow = replace(H100, latency_seconds=100 * H100.latency_seconds)
    shallow = predict_decode(DECODE, slow)
    assert shallow.fraction_of_peak < deep
    assert shallow.limit == "latency"


def test_short_key_tiles_pay_for_rescaling() -> None:
    short = predict_prefill(replace(PREFILL, config="128x16, 8 warps, 2 stages"), H100)
    assert short.limit == "float32 work"
    assert short.fraction_of_peak < predict_prefill(PREFILL, H100).fraction_of_peak


def test_prefill_by_hand() -> None:
    """One row of 128 x 128 scores: 8.4 MFLOP of products against 16,384 exponentials and more."""
    flops_per_cycle = 989e12 / 132 / 1.755e9
    product = 4 * 128 * 128 * 128 / flops_per_cycle
    beside = 16_384 / 16 + 5 * 16_384 / 128 + 128 * 128 / 128
    prediction = predict_prefill(PREFILL, H100)
    assert prediction.fraction_without_overlap is not None
    ratio = prediction.fraction_without_overlap / prediction.fraction_of_peak
    assert ratio == pytest.approx(max(product, beside) / (product + beside), rel=1e-6)


def test_what_the_model_does_not_cover_is_left_out() -> None:
    others = [replace(DECODE, shape="64 bf16/bf16"), replace(DECODE, kernel="rms_norm")]
    assert predict(others) == []

"""Whole plans, held against sums made by hand, and what every plan promises."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from planned_model import BF16, DEMAND, IDEAL, LLAMA_8B, ROUND, llama

from antiphon.deployment.capacity_model import Assumptions, Formats, GpuModel
from antiphon.deployment.capacity_plan import Plan, make_plan
from antiphon.deployment.capacity_pools import Demand, tail_wait_seconds
from antiphon.deployment.gpus import GPUS
from antiphon.errors import ConfigError


def test_a_whole_plan_by_hand() -> None:
    """12 GB less 1 of runtime and 1 of weights; 8 of the 10 left hold 8,000 tokens of 1 MB."""
    demand = Demand(
        ttft_seconds=0.1,
        tpot_seconds=0.004,
        requests_per_second=20,
        prompt_tokens=101,
        output_tokens=98,
    )
    plan = make_plan(ROUND, demand)
    assert plan.memory.kv_tokens == 8000
    assert plan.decode.num_fitting_requests == 40  # of 199 tokens
    # 1 GB + B * 150 MB at 1 TB/s within 4 ms: B = 20, exactly 4 ms.
    assert plan.decode.floor_seconds == pytest.approx(1.15e-3)
    assert plan.decode.max_batch == 20
    assert plan.decode.max_batch_seconds == pytest.approx(4e-3)
    # 20 * 98 tokens/s; a worker makes 5,000, half of which are planned for. Links: 20 * 100 MB/s
    # are 2 GB/s, of 5 planned for.
    assert plan.decode.num_workers == 1
    # B requests every 1 + 0.15 B ms make 1,960 tokens/s from B = 2.78 on.
    assert plan.decode.batch == 3
    assert plan.decode.step_seconds == pytest.approx(1.45e-3)
    # 100 tokens * 1e9 FLOP and 5,000 pairs * 1 MFLOP, at 10 TFLOP/s.
    assert plan.prefill.prompt_seconds == pytest.approx(10.5e-3)
    assert plan.prefill.load == pytest.approx(0.21)
    assert plan.prefill.num_workers == 1
    assert plan.links.bytes_per_request == 100_000_000
    assert plan.links.total_bytes_per_second == 2e9
    assert plan.links.exposed_seconds == pytest.approx(10e-3)
    # ln(2.1) / 1.58 * 10.5 ms and ln(2) / 1.6 * 10 ms.
    assert plan.prefill.wait_seconds == pytest.approx(4.9305e-3, rel=1e-4)
    assert plan.links.wait_seconds == pytest.approx(4.3322e-3, rel=1e-4)
    assert plan.ttft_seconds == pytest.approx(
        10.5e-3 + 10e-3 + 4.9305e-3 + 4.3322e-3 + 2.9e-3, rel=1e-4
    )
    # 100 MB in what 100 ms leave; but 2 GB/s at half of a link are more.
    assert plan.links.least_bytes_per_second == pytest.approx(4e9)
    assert plan.num_gpus == 2


def test_a_long_prompts_transfer_hides_behind_later_steps() -> None:
    demand = Demand(
        ttft_seconds=1.0,
        tpot_seconds=0.01,
        requests_per_second=1,
        prompt_tokens=401,
        output_tokens=98,
    )
    plan = make_plan(ROUND, demand)
    # 4 steps of 12 ms; 4 pieces of 10 ms: only the last piece is left at the end.
    assert plan.prefill.prompt_seconds == pytest.approx(48e-3)
    assert plan.links.exposed_seconds == pytest.approx(10e-3)
    slow = replace(ROUND, assumptions=replace(IDEAL, link_bytes_per_second=5e9))
    # 4 pieces of 20 ms begin after the first step and end 44 ms after the last.
    assert make_plan(slow, demand).links.exposed_seconds == pytest.approx(80e-3 - 36e-3)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.9])
def test_the_wait_is_that_of_a_simulated_queue(load: float) -> None:
    draw, now, free, waits = random.Random(1), 0.0, 0.0, []
    for _ in range(100_000):
        now += draw.expovariate(load)
        start_at = max(now, free)
        waits.append(start_at - now)
        free = start_at + 1.0
    simulated = sorted(waits)[90_000]
    assert tail_wait_seconds(load, 1.0) == pytest.approx(simulated, rel=0.1)


def test_hardly_anybody_waits_at_a_low_load() -> None:
    assert tail_wait_seconds(0.1, 1.0) == 0.0
    assert tail_wait_seconds(0.0, 1.0) == 0.0


def holds(plan: Plan) -> None:
    """What is true of every plan."""
    demand, decode = plan.demand, plan.decode
    assert plan.ttft_seconds <= demand.ttft_seconds
    assert decode.step_seconds <= decode.max_batch_seconds <= demand.tpot_seconds
    assert 1 <= decode.batch <= decode.max_batch <= decode.num_fitting_requests
    made = decode.num_workers * decode.batch / decode.step_seconds
    assert made >= demand.requests_per_second * demand.output_tokens
    share = plan.model.assumptions.utilisation
    assert plan.prefill.load <= share
    fewest = min(decode.num_workers, plan.prefill.num_workers)
    rate = plan.model.assumptions.link_bytes_per_second
    assert plan.links.total_bytes_per_second / fewest / rate <= share
    assert plan.links.least_bytes_per_second <= rate * 1.000001


@pytest.mark.parametrize("gpu", GPUS)
def test_every_plan_keeps_what_it_promises_and_grows_with_the_rate(gpu: str) -> None:
    model, before = llama(gpu, link_bytes_per_second=10e9), 0
    for rate, ttft in itertools.product((0.1, 1, 10, 100, 1000), (1.0, 0.5)):
        plan = make_plan(model, replace(DEMAND, requests_per_second=rate, ttft_seconds=ttft))
        holds(plan)
        if ttft == 1.0:
            assert plan.num_gpus >= before
            before = plan.num_gpus


def test_a_tighter_time_to_the_first_token_takes_more_workers() -> None:
    model = llama("H100", link_bytes_per_second=25e9)
    demand = replace(DEMAND, requests_per_second=100)
    plans = [make_plan(model, replace(demand, ttft_seconds=s)) for s in (0.5, 0.1, 0.085)]
    assert plans[0].prefill.num_workers < plans[1].prefill.num_workers
    assert plans[1].num_gpus < plans[2].num_gpus
    for plan in plans:
        holds(plan)


def test_one_prefill_worker_less_would_miss_the_time() -> None:
    model = llama("H100", link_bytes_per_second=1e12)  # nobody waits for a link
    demand = replace(DEMAND, requests_per_second=100, ttft_seconds=0.1)
    plan = make_plan(model, demand)
    pool = plan.prefill
    assert plan.links.wait_seconds == 0
    assert pool.num_workers > 100 * pool.prompt_seconds / 0.7 + 1  # what the load alone wants
    load = pool.load * pool.num_workers / (pool.num_workers - 1)
    longer = tail_wait_seconds(load, pool.prompt_seconds) - pool.wait_seconds
    assert plan.ttft_seconds <= 0.1 < plan.ttft_seconds + longer


def test_slow_links_cost_workers_or_are_refused() -> None:
    slow = make_plan(llama("H100", link_bytes_per_second=1.5e9), DEMAND)
    holds(slow)
    assert slow.num_gpus > make_plan(llama("H100", link_bytes_per_second=10e9), DEMAND).num_gpus
    with pytest.raises(ConfigError, match=r"--ttft: 500\.0 ms cannot be met .* faster links"):
        make_plan(llama("H100", link_bytes_per_second=2e8), DEMAND)


REFUSALS = [
    (
        {"shape": {"num_parameters": 70_000_000_000}},
        r"140\.0 GB in bfloat16, and H100 has 78\.5 GB for them.* more memory",
    ),
    (
        {"shape": {"num_parameters": 39_200_000_000}},
        r"no request fits: 1280 tokens of KV take 0\.2 GB, and the cache has 0\.1 GB.* int8",
    ),
    (
        {"demand": {"tpot_seconds": 0.008}},
        r"--tpot: 8\.0 ms is below what H100 can do.* 8\.5 ms a step, to read 15\.2 GB",
    ),
    (
        {"demand": {"ttft_seconds": 0.05}},
        r"--ttft: 50\.0 ms cannot be met .* prefill 31\.4 ms, transfer 89\.4 ms.* faster links",
    ),
    (
        {"demand": {"prompt_tokens": 8000}},
        "8256 tokens exceeds the model's context of 8192: choose less --prompt-tokens",
    ),
    (
        {"gpu": "A100-80", "formats": Formats("bfloat16", "fp8", "fp8")},
        "--kv-cache-dtype: got fp8, which A100-80 lacks; use int8",
    ),
]


@pytest.mark.parametrize(("case", "words"), REFUSALS)
def test_what_cannot_work_is_refused_with_what_to_change(case: dict[str, Any], words: str) -> None:
    shape = replace(LLAMA_8B, **case.get("shape", {}))
    gpu = GPUS[case.get("gpu", "H100")]
    model = GpuModel(shape, gpu, case.get("formats", BF16), Assumptions())
    with pytest.raises(ConfigError, match=words):
        make_plan(model, replace(DEMAND, **case.get("demand", {})))

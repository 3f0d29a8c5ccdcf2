"""Two pools that keep targets come up to two colocated workers, and do better where they should.

The real policy and engines in virtual time; see ``simulated_pools``. Each traffic is close to what
two colocated workers can serve inside the targets.
"""

import statistics

import pytest
from simulated_pools import SimulatedPools, serve
from virtual_time import Traffic

from antiphon.messages import Role
from antiphon.router.decision import Reason

POOLS = (Role.PREFILL, Role.DECODE)
COLOCATED = (Role.COLOCATED, Role.COLOCATED)
TTFT_SECONDS, ITL_SECONDS = 1.7, 0.15


def attainment(pools: SimulatedPools) -> float:
    """Share of the requests that were inside both targets."""
    targets = pools.ttft_seconds, pools.itl_seconds
    inside = [served.is_inside(*targets) for served in pools.served.values()]
    return sum(inside) / len(inside)


def median_tpot_seconds(pools: SimulatedPools) -> float:
    return statistics.median(served.tpot_seconds for served in pools.served.values())


def mean_streams(pools: SimulatedPools) -> list[float]:
    """Of each worker, over the time of its steps."""
    return [
        sum(step.num_streams * step.seconds for step in worker.steps)
        / sum(step.seconds for step in worker.steps)
        for worker in pools.workers.values()
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_streams_are_split_as_evenly_as_between_colocated_workers(seed):
    traffic = Traffic((16, 48), (64, 96), rate=1.9, count=60, seed=seed)
    pools = serve(POOLS, (TTFT_SECONDS, ITL_SECONDS), traffic)
    on_prefill, on_decode = mean_streams(pools)
    assert 0.6 * on_decode < on_prefill < 1.1 * on_decode
    colocated = serve(COLOCATED, (TTFT_SECONDS, ITL_SECONDS), traffic)
    assert attainment(pools) >= attainment(colocated) - 0.05


@pytest.mark.parametrize(
    ("traffic", "targets"),
    [
        (Traffic((64, 128), (32, 64), rate=1.6, count=60), (2.0, 0.15)),
        (Traffic((384, 640), (8, 16), rate=1.0, count=40), (10.0, 0.5)),
    ],
    ids=["chat", "long_prompts"],
)
def test_where_prompts_and_outputs_are_balanced_two_pools_are_not_worse(traffic, targets):
    pools = serve(POOLS, targets, traffic)
    colocated = serve(COLOCATED, targets, traffic)
    assert attainment(pools) >= attainment(colocated) - 0.05


def test_where_prompts_hurt_most_they_are_kept_apart():
    targets = 2.4, 0.075
    traffic = Traffic((96, 192), (12, 20), rate=1.4, count=60)
    pools = serve(POOLS, targets, traffic)
    colocated = serve(COLOCATED, targets, traffic)
    assert pools.reasons().count(Reason.REMOTE) > 0.8 * traffic.count
    assert attainment(pools) > 0.9
    assert median_tpot_seconds(pools) < 0.95 * median_tpot_seconds(colocated)


def test_steps_with_prompt_tokens_stay_within_the_target():
    pools = serve(COLOCATED, (2.0, 0.2), Traffic((64, 128), (32, 64), 1.2, 40))
    mixed = [
        step.seconds
        for worker in pools.workers.values()
        for step in worker.steps[50:]
        if step.num_streams and step.num_prompt_tokens
    ]
    assert statistics.quantiles(mixed, n=10)[-1] < 1.1 * 0.2  # steps vary by 8 %

import pytest
from msgspec.structs import replace

from antiphon.router.cost_model import CostModel, CostParameters

PARAMETERS = CostParameters(
    default_prefill_tokens_per_second=100.0,
    default_decode_step_seconds=0.5,
    handoff_seconds=0.25,
    link_bytes_per_second=1000.0,
    stream_slowdown=0.5,
    stall_weight=0.5,
    full_seconds=7.0,
)


@pytest.fixture
def model() -> CostModel:
    return CostModel(PARAMETERS)


def test_prefill_waits_for_the_queue(cluster, model):
    assert model.prefill_seconds(cluster.idle, 500, 1000) == 1.5
    unmeasured = replace(cluster.idle, prefill_tokens_per_second=0.0)
    assert model.prefill_seconds(unmeasured, 0, 1000) == 10.0


def test_handoff_has_a_fixed_part_and_one_per_byte(model):
    assert model.handoff_seconds(100, 5) == 0.75
    assert model.handoff_seconds(0, 5) == 0.25


def test_the_first_step_waits_for_those_before_it(cluster, model):
    assert model.wait_seconds(cluster.idle, 0) == 0.05
    crowded = replace(cluster.idle, num_waiting=2)
    assert model.wait_seconds(crowded, 4) == pytest.approx(0.05 * (1 + 2 + 0.5 * 4))
    unmeasured = replace(cluster.idle, decode_step_seconds=0.0)
    assert model.wait_seconds(unmeasured, 0) == 0.5


def test_a_prompt_is_charged_for_the_streams_that_it_stalls(cluster, model):
    assert model.stall_seconds(cluster.idle, 1000) == 0.0
    assert model.stall_seconds(replace(cluster.idle, num_running=4), 1000) == 2.0


def test_room_is_charged_when_blocks_are_short(cluster, model):
    """Blocks that a worker keeps for its requests, or that were sent for, are no room."""
    load = replace(cluster.idle, num_free_blocks=15, num_running=3)
    assert model.room_seconds(load, 2, 10) == 0.0
    assert model.room_seconds(load, 2, 11) == 7.0
    assert model.room_seconds(replace(load, num_waiting=1), 0, 1) == 7.0

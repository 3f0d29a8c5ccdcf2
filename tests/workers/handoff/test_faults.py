"""What goes wrong on a link, by name; send 0 of a link is its handshake."""

import pytest
from handoff_pair import wait_until
from memory_transport import Fault, FaultPlan

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff.receiver import ReceiverLimits

SOURCE, TARGET = [3, 1, 4, 15, 9], [2, 6, 5, 35, 8]


def test_a_corrupt_header_breaks_the_link(make_memory_pair):
    pair = make_memory_pair(FaultPlan({2: Fault.CORRUPT_HEADER}))
    pair.transfer(SOURCE, TARGET, 0, 20)
    _, num_tokens, error = pair.next_completed()
    assert num_tokens == 4
    assert "wrong header checksum" in str(error)
    assert isinstance(pair.next_done()[1], LinkBrokenError)
    assert pair.receiver.counters().broken_links == 1


def test_a_lost_end_times_out(make_memory_pair):
    limits = ReceiverLimits(timeout_seconds=0.1, io_timeout_seconds=1)
    pair = make_memory_pair(FaultPlan({6: Fault.DROP}), receiver_limits=limits)
    pair.transfer(SOURCE, TARGET, 0, 20)
    assert "20 of 20 tokens arrived in 0.1 s; timed out" in str(pair.next_completed()[2])
    wait_until(lambda: pair.receiver.num_links == 0)


@pytest.mark.parametrize("fault", [Fault.BREAK_BEFORE, Fault.BREAK_AFTER])
@pytest.mark.parametrize("step", range(7))
def test_the_link_may_die_at_any_step(make_memory_pair, fault, step):
    limits = ReceiverLimits(timeout_seconds=0.3, io_timeout_seconds=1)
    pair = make_memory_pair(FaultPlan({step: fault}), receiver_limits=limits)
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 20)
    completed_id, num_tokens, error = pair.next_completed()
    assert completed_id == transfer_id
    assert (error is None) == (num_tokens == 20 and step == 6 and fault is Fault.BREAK_AFTER) or (
        isinstance(error, LinkBrokenError)
    )
    assert pair.arrived(SOURCE, TARGET, 0, num_tokens) or num_tokens == 0
    assert not pair.target.tokens(TARGET, num_tokens, 20).any(), "a half-written segment"
    assert pair.next_done()[0] == transfer_id

"""Who failed lately is passed over for a while, with a clock that the test moves."""

from antiphon.workers.prefill_outcome import Outcome
from antiphon.workers.shunned_peers import ShunnedPeers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shunned_for(peers: ShunnedPeers, clock: Clock, incarnation: str) -> float:
    """Move the clock until the peer is trusted again; seconds, to a tenth."""
    began = clock.now
    while peers.is_shunned(incarnation):
        clock.now = round(clock.now + 0.1, 6)
    return round(clock.now - began, 6)


def test_penalties_double_up_to_a_bound() -> None:
    peers = ShunnedPeers(clock := Clock())
    penalties = []
    for _ in range(7):
        peers.failed("p")
        penalties.append(shunned_for(peers, clock, "p"))
    assert penalties == [1, 2, 4, 8, 16, 30, 30]


def test_transfers_that_fail_together_are_one_failure() -> None:
    peers = ShunnedPeers(clock := Clock())
    for _ in range(32):
        peers.failed("p")
    assert shunned_for(peers, clock, "p") == 1
    peers.failed("p")
    assert shunned_for(peers, clock, "p") == 2


def test_a_success_and_a_new_incarnation_start_anew() -> None:
    peers = ShunnedPeers(clock := Clock())
    for _ in range(3):
        peers.failed("p")
        shunned_for(peers, clock, "p")
    assert not peers.is_shunned("restarted")
    peers.succeeded("p")
    peers.failed("p")
    assert shunned_for(peers, clock, "p") == 1


def test_a_busy_peer_is_left_alone_for_a_second_and_not_punished() -> None:
    peers = ShunnedPeers(clock := Clock())
    for _ in range(3):
        peers.busy("p")
        assert shunned_for(peers, clock, "p") == 1
    peers.failed("p")
    assert shunned_for(peers, clock, "p") == 1
    peers.busy("p")
    assert shunned_for(peers, clock, "p") == 1
    peers.failed("p")
    assert shunned_for(peers, clock, "p") == 2, "being busy is no success either"


def test_busy_shortens_no_penalty_and_a_leaving_peer_gets_the_longest() -> None:
    peers = ShunnedPeers(clock := Clock())
    for penalty in (1, 2):
        peers.failed("p")
        peers.busy("p")
        assert shunned_for(peers, clock, "p") == penalty
    peers.leaving("p")
    assert shunned_for(peers, clock, "p") == 30


def test_why_a_peer_is_shunned_is_known_and_a_failure_is_not_taken_for_being_busy() -> None:
    peers = ShunnedPeers(clock := Clock())
    peers.busy("p")
    assert peers.why("p") is Outcome.BUSY
    for _ in range(32):
        peers.failed("p")
    peers.busy("p")
    assert peers.why("p") is Outcome.FAILED
    assert shunned_for(peers, clock, "p") == 1, "all that failed together is one failure"
    assert peers.why("p") is None
    peers.leaving("p")
    peers.failed("p")
    assert peers.why("p") is Outcome.DRAINING


def test_a_penalty_is_forgotten_also_if_nobody_else_fails_meanwhile() -> None:
    for seconds, penalty in ((29.0, 30), (31.0, 1), (3600.0, 1)):
        peers = ShunnedPeers(clock := Clock())
        for _ in range(5):
            peers.failed("p")
            shunned_for(peers, clock, "p")
        clock.now += seconds
        peers.failed("p")
        assert shunned_for(peers, clock, "p") == penalty
        clock.now += 3600
        peers.busy("p")
        shunned_for(peers, clock, "p")
        peers.failed("p")
        assert shunned_for(peers, clock, "p") == 1, "being busy hands on no old penalty"


def test_what_failed_long_ago_is_forgotten() -> None:
    peers = ShunnedPeers(clock := Clock())
    for index in range(100):
        peers.failed(f"incarnation {index}")
        clock.now += 10
    assert len(peers) < 10

"""A communicator that is never made costs its link, and holds that link's thread for a bound."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from half_made_link import HalfMade
from handoff_pair import Pair, handoff_threads, wait_until
from nccl_stand_in import stand_in_transport

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff import set_up
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.receiver import ReceiverLimits
from antiphon.workers.handoff.set_up import SetUps

WAIT_SECONDS = 10.0


class Made:
    """What came of a set-up."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


class Peer:
    """One that may stay away for ever: a set-up ends when it is let."""

    def __init__(self) -> None:
        self.comes = threading.Event()
        self.made: list[Made] = []

    def __call__(self, *_: Any) -> Made:
        assert self.comes.wait(WAIT_SECONDS), "the test forgot to let go"
        self.made.append(Made())
        return self.made[-1]


@pytest.fixture
def peer() -> Iterator[Peer]:
    before, absent = handoff_threads(), Peer()
    yield absent
    absent.comes.set()
    wait_until(lambda: handoff_threads() <= before)


def test_one_in_time_is_the_link_s(peer: Peer) -> None:
    peer.comes.set()
    made = SetUps().run(peer, WAIT_SECONDS)
    assert [made] == peer.made
    assert not made.aborted.is_set()


def test_one_that_hangs_is_given_up_and_aborted_when_it_returns_after_all(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    set_ups = SetUps()
    began_at = time.monotonic()
    with pytest.raises(LinkBrokenError, match=r"did not end in 0\.1 s"):
        set_ups.run(peer, 0.1)
    assert time.monotonic() - began_at < 5
    assert set_ups.num_given_up == 1
    assert "1 such hang now" in caplog.text
    peer.comes.set()
    wait_until(lambda: set_ups.num_given_up == 0)
    assert peer.made[0].aborted.wait(WAIT_SECONDS)


def test_a_failure_says_what_nccl_said() -> None:
    def fail() -> None:
        raise RuntimeError("unhandled system error")

    with pytest.raises(LinkBrokenError, match="NCCL set-up failed: unhandled system error"):
        SetUps().run(fail, WAIT_SECONDS)


def test_while_many_hang_none_is_begun(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_up, "MAX_GIVEN_UP", 2)
    set_ups = SetUps()
    for _ in range(2):
        with pytest.raises(LinkBrokenError, match="did not end"):
            set_ups.run(peer, 0.01)
    with pytest.raises(LinkBrokenError, match="2 that were given up hang still"):
        set_ups.run(peer, WAIT_SECONDS)
    peer.comes.set()
    wait_until(lambda: set_ups.num_given_up == 0)
    assert set_ups.run(peer, WAIT_SECONDS) is peer.made[-1]


def test_a_link_whose_communicator_is_never_made_breaks_at_both_ends(peer: Peer) -> None:
    """Each end sees what it would if the other one had died after the two met over gloo."""
    connecting, accepting = (stand_in_transport("127.0.0.1", peer) for _ in range(2))
    errors: list[BaseException] = []

    def accept() -> None:
        try:
            accepting.accept("link", 60, 0.5)
        except LinkBrokenError as error:
            errors.append(error)

    accepting_thread = threading.Thread(target=accept)
    accepting_thread.start()
    with pytest.raises(LinkBrokenError, match="NCCL set-up did not end"):
        connecting.connect(accepting.address, "link", 0.5)
    accepting_thread.join(WAIT_SECONDS)
    assert ["NCCL set-up did not end" in str(error) for error in errors] == [True]
    connecting.close()
    accepting.close()
    peer.comes.set()
    wait_until(lambda: len(peer.made) == 2)
    assert all(made.aborted.wait(WAIT_SECONDS) for made in peer.made)


def test_a_link_that_only_one_end_could_make_is_offered_no_longer_than_that_may_take() -> None:
    """Nobody says that a link failed which no transfer wanted yet."""
    limits = ReceiverLimits(timeout_seconds=60, io_timeout_seconds=0.5)
    pair = Pair(HalfMade("127.0.0.1"), GlooTransport("127.0.0.1"), receiver_limits=limits)
    pair.sender.prewarm(pair.receiver.prewarm("prefill-1"))
    wait_until(lambda: pair.receiver.num_links == 0)
    assert pair.receiver.counters().failed_prewarms == {"broken": 1}
    transfer_id = pair.transfer([3, 1], [2, 6], 0, 8)
    assert pair.next_completed() == (transfer_id, 8, None)
    pair.close()

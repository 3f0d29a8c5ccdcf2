"""A communicator that is never made, or never ends, costs its link and holds nobody's thread."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from half_made_link import HalfMade
from handoff_pair import Pair, handoff_threads, wait_until
from nccl_stand_in import stand_in_transport

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff import bounded_calls, communicators
from antiphon.workers.handoff.communicators import Communicators
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.receiver import ReceiverLimits

WAIT_SECONDS = 10.0


class Made:
    """What came of a set-up: a link, or the communicator of one."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def close(self) -> None:
        self.ended.set()

    abort = close

    def send(self, *_: Any) -> Any:
        return SimpleNamespace(is_completed=lambda: True, exception=lambda: None)

    recv = send


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
    made = Communicators().make(peer, WAIT_SECONDS)
    assert [made] == peer.made
    assert not made.ended.is_set()


def test_a_failure_says_what_nccl_said() -> None:
    def fail() -> None:
        raise RuntimeError("unhandled system error")

    with pytest.raises(LinkBrokenError, match="NCCL set-up failed: unhandled system error"):
        Communicators().make(fail, WAIT_SECONDS)


def test_an_end_that_hangs_holds_nobody_and_counts_as_well(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(communicators, "END_SECONDS", 0.01)
    monkeypatch.setattr(bounded_calls, "MAX_GIVEN_UP", 1)
    enders = Communicators()
    began_at = time.monotonic()
    enders.end(lambda: peer().close())
    assert time.monotonic() - began_at < 5
    wait_until(lambda: enders.num_given_up == 1)
    wait_until(lambda: "NCCL abort is given up; 1 such calls hang now" in caplog.text)
    with pytest.raises(LinkBrokenError, match="1 aborts hang"):
        enders.make(peer, WAIT_SECONDS)
    another = Made()
    enders.end(another.abort)  # it holds memory, so it is ended all the same
    assert another.ended.wait(WAIT_SECONDS)
    peer.comes.set()
    wait_until(lambda: enders.num_given_up == 0)
    assert peer.made[0].ended.is_set()


def test_where_no_thread_can_be_started_a_communicator_is_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = Made()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    Communicators().end(made.abort)
    assert made.ended.is_set()
    assert "without a thread of its own: can't start new thread" in caplog.text
    inner = Made()
    Communicators()._end(inner.abort)
    assert inner.ended.is_set()


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
    assert all(made.ended.wait(WAIT_SECONDS) for made in peer.made)


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

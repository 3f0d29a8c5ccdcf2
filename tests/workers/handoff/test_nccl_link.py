"""What NCCL does to the thread that calls it must not reach whoever uses or closes a link."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from handoff_pair import WAIT_SECONDS, Pair, handoff_threads, wait_until
from nccl_stand_in import Group, stand_in_transport
from torch import Tensor

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff.communicators import Communicators
from antiphon.workers.handoff.nccl import NcclLink, NcclParts
from antiphon.workers.handoff.receiver import ReceiverLimits
from antiphon.workers.handoff.transport import Link

SOURCE, TARGET = [3, 1], [2, 6]
AT_ONCE_SECONDS = 5.0  # beside calls that hang until the test lets go


class Nccl:
    """Groups of both ends of a link that block their callers where NCCL does.

    A send waits for the peer's first receive, as where a connection is made with the first
    message; and an abort for the peer.
    """

    def __init__(self) -> None:
        self.receives = threading.Event()  # the peer does
        self.may_receive = threading.Event()
        self.may_abort = threading.Event()
        self.aborts: list[BlockingGroup] = []
        for event in (self.may_receive, self.may_abort):
            event.set()

    def __call__(self, *args: Any) -> "BlockingGroup":
        return BlockingGroup(self, *args)

    def let_go(self) -> None:
        for event in (self.receives, self.may_receive, self.may_abort):
            event.set()


class BlockingGroup(Group):
    def __init__(self, nccl: Nccl, *args: Any) -> None:
        super().__init__(*args)
        self._nccl = nccl

    def send(self, tensors: list[Tensor], *args: Any) -> Any:
        assert self._nccl.receives.wait(WAIT_SECONDS), "the test forgot to let go"
        return super().send(tensors, *args)

    def recv(self, tensors: list[Tensor], *args: Any) -> Any:
        assert self._nccl.may_receive.wait(WAIT_SECONDS), "the test forgot to let go"
        self._nccl.receives.set()
        return super().recv(tensors, *args)

    def abort(self) -> None:
        self._nccl.aborts.append(self)
        assert self._nccl.may_abort.wait(WAIT_SECONDS), "the test forgot to let go"
        super().abort()


@pytest.fixture
def nccl() -> Iterator[Nccl]:
    before, made = handoff_threads(), Nccl()
    yield made
    made.let_go()
    wait_until(lambda: handoff_threads() <= before)


def join(nccl: Nccl, seconds: float) -> list[Link | BaseException]:
    """Both ends of a link, or why there is none."""
    connecting, accepting = (stand_in_transport("127.0.0.1", nccl) for _ in range(2))
    ends: list[Link | BaseException] = []

    def run(call: Callable[[], Link]) -> None:
        try:
            ends.append(call())
        except LinkBrokenError as error:
            ends.append(error)

    address = accepting.address
    calls = (
        lambda: accepting.accept("link", 60, seconds),
        lambda: connecting.connect(address, "link", seconds),
    )
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    connecting.close()
    accepting.close()
    return ends


def test_a_link_that_is_made_has_sent_its_first_message(nccl: Nccl) -> None:
    ends = join(nccl, 5)
    assert nccl.receives.is_set()
    for end in ends:
        assert isinstance(end, NcclLink)
        end.close()


def test_a_peer_that_hangs_before_the_first_message_costs_the_set_up_alone(nccl: Nccl) -> None:
    nccl.may_receive.clear()
    began_at = time.monotonic()
    ends = join(nccl, 0.3)
    assert time.monotonic() - began_at < AT_ONCE_SECONDS
    assert ["NCCL set-up did not end in 0.3 s" in str(end) for end in ends] == [True, True]
    assert len(nccl.aborts) == 0  # there is nothing yet that could be aborted
    nccl.let_go()
    wait_until(lambda: len(nccl.aborts) == 2)


def sender_leaves(pair: Pair) -> None:
    pair.sender.leave("decode-1")


def receiver_leaves(pair: Pair) -> None:
    pair.receiver.leave("prefill-1")


def receiver_retires(pair: Pair) -> None:
    pair.receiver.retire(pair.receiver.offer("prefill-1").link_id)


def receiver_evicts(pair: Pair) -> None:
    pair.receiver.offer("prefill-2")


@pytest.mark.parametrize(
    "close", [sender_leaves, receiver_leaves, receiver_retires, receiver_evicts]
)
def test_whoever_closes_a_link_does_not_wait_for_the_abort(
    nccl: Nccl, close: Callable[[Pair], None]
) -> None:
    """Those who do stand on a worker's event loop; nor does the link's own thread."""
    limits = ReceiverLimits(timeout_seconds=5, io_timeout_seconds=2, max_links=1)
    pair = Pair(*(stand_in_transport("127.0.0.1", nccl) for _ in range(2)), receiver_limits=limits)
    transfer_id = pair.transfer(SOURCE, TARGET, 0, 8)
    assert pair.next_completed() == (transfer_id, 8, None)
    assert pair.next_done()[1] is None
    nccl.may_abort.clear()
    began_at = time.monotonic()
    close(pair)
    # The receiver's thread always has a receive posted, so it sees either end close.
    wait_until(lambda: not any("recv" in thread.name for thread in handoff_threads()))
    assert time.monotonic() - began_at < AT_ONCE_SECONDS
    wait_until(lambda: len(nccl.aborts) > 0)
    pair.close()


def test_nothing_is_aborted_while_a_work_is_being_posted_to_it() -> None:
    posting, go_on, aborted = threading.Event(), threading.Event(), threading.Event()

    def send(*_: Any) -> Any:
        posting.set()
        assert go_on.wait(WAIT_SECONDS)
        assert not aborted.is_set(), "posted to freed memory"
        return SimpleNamespace(is_completed=lambda: False)

    group = SimpleNamespace(send=send, abort=aborted.set)
    control: Any = SimpleNamespace(close=lambda: None)
    parts = NcclParts(
        is_control=lambda _: False,
        make_stream=lambda: None,
        on_stream=lambda _: contextlib.nullcontext(),
    )
    link = NcclLink(control, group, 0, parts, Communicators().end)
    errors: list[BaseException] = []

    def post() -> None:
        try:
            link.send([torch.zeros(1, dtype=torch.uint8)], WAIT_SECONDS)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=post)
    thread.start()
    assert posting.wait(WAIT_SECONDS)
    link.close()
    assert not aborted.wait(0.05)
    go_on.set()
    assert aborted.wait(WAIT_SECONDS)
    thread.join(WAIT_SECONDS)
    assert [type(error) for error in errors] == [LinkBrokenError]
    with pytest.raises(LinkBrokenError, match="closed at this end"):
        link.send([torch.zeros(1, dtype=torch.uint8)], WAIT_SECONDS)

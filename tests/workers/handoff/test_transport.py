"""What every transport promises."""

import threading
import time

import pytest
import torch

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff import gloo
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.transport import Link, Transport


def _bytes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def _join(transports: tuple[Transport, Transport], link_id: str = "link") -> tuple[Link, Link]:
    """Return (connecting end, accepting end)."""
    connecting, accepting = transports
    address = accepting.address
    accepted: list[Link] = []
    thread = threading.Thread(target=lambda: accepted.append(accepting.accept(link_id, 5)))
    thread.start()
    connected = connecting.connect(address, link_id, 5)
    thread.join(10)
    return connected, accepted[0]


class _Blocked:
    """A call on a thread of its own, and how it ended."""

    def __init__(self, call):
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except (LinkBrokenError, TimeoutError) as error:
            self.error = error

    def finish(self) -> BaseException | None:
        self._thread.join(5)
        assert not self._thread.is_alive(), "the call is still blocked"
        return self.error


def test_tensors_arrive_in_order(transports):
    sender, receiver = _join(transports)
    sending = _Blocked(
        lambda: [sender.send([_bytes(i), _bytes(i, i + 1, i + 2)], 5) for i in range(50)]
    )
    for i in range(50):
        first, rest = torch.empty(1).byte(), torch.empty(3).byte()
        receiver.recv(first, 5)
        receiver.recv(rest, None)
        assert first.tolist() == [i]
        assert rest.tolist() == [i, i + 1, i + 2]
    assert sending.finish() is None
    sender.close()
    receiver.close()


def test_answers_go_back(transports):
    sender, receiver = _join(transports)
    answering = _Blocked(lambda: receiver.send([_bytes(9)], 5))
    answer = torch.empty(1).byte()
    sender.recv(answer, 5)
    assert answer.tolist() == [9]
    assert answering.finish() is None
    sender.close()
    receiver.close()


def test_what_was_sent_may_be_reused(transports):
    sender, receiver = _join(transports)
    staging = torch.full((1 << 20,), 1, dtype=torch.uint8)

    def send_twice() -> None:
        for value in (1, 2):
            staging.fill_(value)
            sender.send([staging], 5)
        staging.fill_(3)

    sending = _Blocked(send_twice)
    received = torch.empty(1 << 20).byte()
    for value in (1, 2):
        receiver.recv(received, 5)
        assert received.eq(value).all()
    assert sending.finish() is None
    sender.close()
    receiver.close()


@pytest.mark.parametrize("closing_end", [0, 1], ids=["sender", "receiver"])
def test_close_unblocks_both_ends(transports, closing_end):
    ends = _join(transports)
    blocked = [_Blocked(lambda end=end: end.recv(_bytes(0), None)) for end in ends]
    began = time.monotonic()
    ends[closing_end].close()
    assert all(isinstance(call.finish(), LinkBrokenError) for call in blocked)
    assert time.monotonic() - began < 2
    for end in ends:
        with pytest.raises(LinkBrokenError):
            end.send([_bytes(1)], 5)
        end.close()
        end.close()


def test_close_unblocks_a_send_that_nobody_takes(transports):
    sender, receiver = _join(transports)
    sending = _Blocked(lambda: [sender.send([torch.zeros(8 << 20).byte()], 30) for _ in range(9)])
    sender.close()
    assert isinstance(sending.finish(), LinkBrokenError)
    receiver.close()


def test_a_time_out_breaks_the_link(transports):
    sender, receiver = _join(transports)
    with pytest.raises(LinkBrokenError):
        receiver.recv(_bytes(0), 0.05)
    with pytest.raises(LinkBrokenError):
        sender.send([torch.zeros(8 << 20).byte()] * 9, 5)


def test_a_broken_link_leaves_others_alone(transports):
    first_sender, first_receiver = _join(transports, "first")
    sender, receiver = _join(transports, "second")
    first_receiver.close()
    first_sender.close()
    sending = _Blocked(lambda: sender.send([_bytes(4)], 5))
    received = torch.empty(1).byte()
    receiver.recv(received, 5)
    assert received.tolist() == [4]
    assert sending.finish() is None
    sender.close()
    receiver.close()


def test_accept_gives_up_and_may_be_repeated(transports):
    _, accepting = transports
    with pytest.raises(TimeoutError, match="nobody connected"):
        accepting.accept("link", 0.05)
    sender, receiver = _join(transports)
    sender.close()
    receiver.close()


def test_a_refused_link_cannot_be_made(transports):
    connecting, accepting = transports
    waiting = _Blocked(lambda: accepting.accept("link", 30))
    accepting.refuse("link")
    assert isinstance(waiting.finish(), LinkBrokenError)
    with pytest.raises(LinkBrokenError, match="refuses the link"):
        connecting.connect(accepting.address, "link", 5)


def test_a_link_is_private(transports):
    connecting, accepting = transports
    sender, receiver = _join(transports)
    with pytest.raises(LinkBrokenError):
        connecting.connect(accepting.address, "link", 0.2)
    sender.close()
    receiver.close()


def test_a_rendezvous_forgets_links_that_ended_long_ago(monkeypatch):
    """A prefill worker with many peers makes room all the time, for as long as both ends live."""
    monkeypatch.setattr(gloo, "_MAX_ENDED", 3)
    both = GlooTransport("127.0.0.1"), GlooTransport("127.0.0.1")
    num_keys = []
    for number in range(8):
        for end in _join(both, f"link-{number}"):
            end.close()
        both[1].refuse(f"link-{number}")
        num_keys.append(both[1]._store().num_keys())
    assert num_keys[0] < num_keys[1] < num_keys[2]
    assert num_keys[3:] == 5 * [num_keys[2]]
    with pytest.raises(LinkBrokenError, match="refuses the link"):
        both[0].connect(both[1].address, "link-7", 5)


def test_nobody_listens(transports):
    began = time.monotonic()
    with pytest.raises(LinkBrokenError, match=r"nobody listens at 127\.0\.0\.1:9"):
        transports[0].connect("127.0.0.1:9", "link", 5)
    assert time.monotonic() - began < 2


def test_closing_the_transport_unblocks_accept(transports):
    waiting = _Blocked(lambda: transports[1].accept("link", 30))
    transports[1].close()
    assert isinstance(waiting.finish(), LinkBrokenError)

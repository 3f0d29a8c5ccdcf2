"""A peer that is frozen while a link is made costs that link, and no thread that holds anything."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from handoff_pair import handoff_threads, wait_until
from nccl_stand_in import stand_in_transport

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff import bounded_calls, gloo
from antiphon.workers.handoff.bounded_calls import BoundedCalls
from antiphon.workers.handoff.gloo import GlooTransport

WAIT_SECONDS = 10.0


class Made:
    """What a call returns in the end."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Hanging:
    """A call that returns when it is let."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.made: list[Made] = []

    def __call__(self) -> Made:
        assert self.go_on.wait(WAIT_SECONDS), "the test forgot to let go"
        self.made.append(Made())
        return self.made[-1]


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    before, call = handoff_threads(), Hanging()
    yield call
    call.go_on.set()
    wait_until(lambda: handoff_threads() <= before)


@pytest.mark.parametrize("make_transport", [GlooTransport, stand_in_transport])
def test_a_peer_that_takes_the_connection_and_never_answers_is_given_up(
    make_transport: Callable[[str], GlooTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped: the kernel takes connections, and what is sent, for it."""
    monkeypatch.setattr(gloo, "_GRACE_SECONDS", 0.1)
    before = handoff_threads()
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            transport.connect(f"127.0.0.1:{frozen.getsockname()[1]}", "link", 0.2)
        except LinkBrokenError as error:
            errors.append(error)

    transport = make_transport("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        connecting = threading.Thread(target=connect, daemon=True)
        connecting.start()
        connecting.join(5)
        assert not connecting.is_alive(), "it waits for ever"
        assert "did not end in 0.3 s" in str(errors[0])
    wait_until(lambda: handoff_threads() <= before)  # the peer has ended, and so does the wait


def test_what_comes_too_late_is_closed(hanging: Hanging, caplog: pytest.LogCaptureFixture) -> None:
    calls: BoundedCalls[Made] = BoundedCalls("connecting")
    began_at = time.monotonic()
    with pytest.raises(LinkBrokenError, match=r"connecting did not end in 0\.1 s"):
        calls.run(hanging, 0.1)
    assert time.monotonic() - began_at < 5
    assert calls.num_given_up == 1
    assert "connecting is given up; 1 such calls hang now" in caplog.text
    hanging.go_on.set()
    wait_until(lambda: calls.num_given_up == 0)
    assert hanging.made[0].closed.wait(WAIT_SECONDS)
    assert not calls.run(hanging, WAIT_SECONDS).closed.is_set()


def test_while_many_hang_none_is_begun(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_calls, "MAX_GIVEN_UP", 2)
    calls: BoundedCalls[Made] = BoundedCalls("connecting")
    for _ in range(2):
        with pytest.raises(LinkBrokenError, match="did not end"):
            calls.run(hanging, 0.01)
    with pytest.raises(LinkBrokenError, match="2 that were given up hang still"):
        calls.run(hanging, WAIT_SECONDS)

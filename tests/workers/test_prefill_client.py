"""What a failed attempt leaves behind: tokens that came, and no link that is of no use."""

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from half_made_link import HalfMade
from handoff_pair import Pair
from ladder_cluster import run
from memory_transport import MemoryNetwork, MemoryTransport
from pools import Client, assert_idle, peer_of, start, until
from tiny_models import tiny_model

from antiphon.errors import PrefillFailedError
from antiphon.messages import PrefillPeer, Role
from antiphon.workers import prefill_client
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.peers import Peers
from antiphon.workers.prefill_client import PrefillClient, Wanted


class SilentSession:
    """With a prefill worker that is asked, and whose link alone answers."""

    is_closed = False

    def __init__(self) -> None:
        self.card = SimpleNamespace(incarnation="prefill-1", replica_id="first")
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


def test_a_transfer_that_ended_as_time_ran_out_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link's thread has ended it, and the event loop does not know yet."""
    network, now, session = MemoryNetwork(), [0.0], SilentSession()
    monkeypatch.setattr(prefill_client, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def get(*_: Any) -> Any:
        return session

    async def scenario() -> None:
        pair = Pair(MemoryTransport(network, "sender:0"), MemoryTransport(network, "receiver:0"))
        peers = Peers("decode-1")
        monkeypatch.setattr(peers, "get", get)
        client = PrefillClient(pair.receiver, peers, stall_seconds=0.02)
        wanted = Wanted("request", list(range(8)), [2, 6], 0)
        peer = PrefillPeer("ws://nowhere", "prefill-1")
        fetching = asyncio.create_task(client.fetch(peer, wanted, deadline=100.0))
        await until(lambda: len(session.sent) == 1)
        pair.sender.open(session.sent[0].request_id, session.sent[0].link, 0)
        pair.send_all(session.sent[0].request_id, [3, 1], 0, 8)
        await until(lambda: not pair.completed.empty())
        now[0] = 100.0
        with pytest.raises(PrefillFailedError, match="no time is left; 8 tokens had come"):
            await fetching
        assert wanted.num_missing == 0
        assert pair.receiver.num_links == 0
        await asyncio.to_thread(pair.close)

    run(scenario())


def test_a_link_that_the_other_end_could_not_make_is_not_offered_again() -> None:
    """This end waits for it still, and would for as long as set-up may take."""
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill = await start(Role.PREFILL, model, transport=HalfMade("127.0.0.1"))
        decode = await start(Role.DECODE, model, transport=GlooTransport("127.0.0.1"))
        receiver = decode.generate.receiver
        receiver.limits = dataclasses.replace(receiver.limits, io_timeout_seconds=1.0)
        client = await Client.connect(decode)
        paths = []
        for first in (5, 6):
            request_id = client.submit([first] * 40, 2, peer_of(prefill))
            await client.finish(request_id)
            paths.append(client.paths[request_id])
            decode.generate._ladder._shunned.succeeded(prefill.card.incarnation)
        assert paths == ["fallback", "remote"]
        attempts = "antiphon_prefill_attempts_total"
        assert decode.metrics.count(attempts, outcome="lost") == 1
        assert decode.metrics.count(attempts, outcome="complete") == 1
        await assert_idle(prefill, decode)
        for closing in (client.session, decode, prefill):
            await closing.close()

    run(scenario())

"""Whatever comes first: every climb ends once, and no prefill worker computes for nobody.

The ladder, the client and the receiver are real. What their surroundings do (link threads, prefill
workers, sessions, the owner, the clock) comes in any order, with and without turns of the event
loop in between. A prefill worker must be told of every transfer that it has not ended itself.
"""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from handoff_pair import WIRE, FakeStore
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_transport import MemoryNetwork, MemoryTransport
from pools import until

from antiphon.errors import PrefillFailedError, SegmentRejectedError
from antiphon.messages import Abort, Prefill, PrefillPeer, RefusalKind, Refused
from antiphon.workers import prefill_client, prefill_ladder
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.incoming import Incoming
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.segment import SenderAccount
from antiphon.workers.peers import Peers
from antiphon.workers.prefill_client import PrefillClient, Wanted
from antiphon.workers.prefill_ladder import LadderLimits, PrefillLadder
from antiphon.workers.shunned_peers import ShunnedPeers
from antiphon.workers.worker_metrics import WorkerMetrics

NUM_REQUESTS = 3
NUM_TOKENS = 8
STALL_SECONDS, TIMEOUT_SECONDS = 0.004, 60.0  # on the test's clock; a tick is a quarter of a stall
PEERS = [PrefillPeer(f"ws://{name}", name) for name in "ab"]
KINDS = ("start", "start", "stop", "reject", "complete", "refuse", "lose", "stall", "late")


class Session:
    """With a prefill worker that is asked, and answers as the test says."""

    def __init__(self, incarnation: str) -> None:
        self.card = SimpleNamespace(incarnation=incarnation, replica_id=incarnation)
        self.is_closed = False
        self.asked: set[str] = set()
        self.told: set[str] = set()

    def send(self, message: Any) -> None:
        known = self.asked if isinstance(message, Prefill) else self.told
        assert isinstance(message, Prefill | Abort)
        known.add(message.request_id)


class World:
    """Requests, their ladder, and everything that may happen to them."""

    def __init__(self) -> None:
        self.now = 0.0
        self._tasks_before = asyncio.all_tasks()
        self.ends: Counter[str] = Counter()  # by request
        self.ended_there: set[str] = set()  # transfers that a prefill worker has ended itself
        self.sessions: list[Session] = []
        self._num_started = 0
        self._wanted: dict[int, Wanted] = {}  # of climbs under way
        endpoint = Endpoint(
            MemoryTransport(MemoryNetwork(), "decode:0"), FakeStore(), "decode-1", WIRE
        )
        self.receiver = HandoffReceiver(endpoint, ReceiverLimits(), self._on_complete)
        peers = Peers("decode-1")
        peers.get = self._get  # type: ignore[method-assign]
        self.client = PrefillClient(self.receiver, peers, STALL_SECONDS)
        shunned = ShunnedPeers(lambda: self.now)
        limits = LadderLimits(timeout_seconds=TIMEOUT_SECONDS)
        self.ladder = PrefillLadder(self.client, shunned, limits, WorkerMetrics("decode"), self)

    def act(self, kind: str, number: int) -> None:
        wanted = self._wanted.get(number)
        transfer = wanted.transfer if wanted is not None else None
        match kind:
            case "start" if wanted is None:
                self._start(number)
            case "stop" if wanted is not None:
                self.stop(number)
            case "reject" if transfer is not None:  # this and the next: as the link's thread
                self.receiver.end(transfer.incoming, SegmentRejectedError("checksum: wrong"))
            case "complete" if transfer is not None:
                self._complete(transfer.incoming)
                self.ended_there.add(transfer.transfer_id)
            case "refuse" if transfer is not None:
                self.ended_there.add(transfer.transfer_id)
                refusal = list(RefusalKind)[self._num_started % len(RefusalKind)]
                refused = Refused(transfer.transfer_id, refusal, "because")
                self.client._on_message(transfer.peer, refused)
            case "lose" if transfer is not None and not transfer.peer.is_closed:
                transfer.peer.is_closed = True
                self.client._on_lost(transfer.peer)
            case "stall":
                self.now += 2 * STALL_SECONDS
            case "late":
                self.now += TIMEOUT_SECONDS
            case _:
                pass  # there is nothing that it could be done to

    def stop(self, number: int) -> None:
        wanted = self._wanted.pop(number)
        self.ladder.stop(wanted.request_id)
        self._end(wanted.request_id)

    async def settle(self) -> None:
        """Stop what is left, and check what must hold for every order."""
        for number in tuple(self._wanted):
            self.stop(number)
        await until(lambda: asyncio.all_tasks() <= self._tasks_before, 10)
        assert all(self.ends[f"request-{n}"] == 1 for n in range(self._num_started)), self.ends
        for session in self.sessions:
            untold = session.asked - session.told - self.ended_there
            assert session.is_closed or not untold, "somebody computes for nobody"
        assert self.client._transfers == {}
        assert self.ladder._climbs == {}
        assert self.receiver.num_pending == 0

    # Of the ladder.

    def kv_arrived(self, wanted: Wanted) -> None:
        assert wanted.num_missing == 0
        self._end(wanted.request_id)

    async def compute_here(self, wanted: Wanted) -> bool:
        has_room = self._num_started % 2 == 0
        if has_room:
            self._end(wanted.request_id)
        return has_room

    def kv_unavailable(self, request_id: str, error: PrefillFailedError) -> None:
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        self.ends[request_id] += 1
        self._wanted = {n: w for n, w in self._wanted.items() if w.request_id != request_id}

    def _start(self, number: int) -> None:
        table = [2 * self._num_started % 64, (2 * self._num_started + 1) % 64]
        wanted = Wanted(f"request-{self._num_started}", list(range(NUM_TOKENS)), table, 0)
        self._num_started += 1
        self._wanted[number] = wanted
        self.ladder.start(wanted, PEERS)

    @staticmethod
    def _arrive(incoming: Incoming) -> None:
        with incoming._lock:
            if incoming._is_live:
                incoming._next = incoming._end

    def _complete(self, incoming: Incoming) -> None:
        self._arrive(incoming)
        self.receiver.complete(incoming, SenderAccount())

    def _on_complete(self, *report: Any) -> None:
        self.client.on_transfer_ended(*report)

    async def _get(self, peer: PrefillPeer, *_: Any) -> Session:
        for session in self.sessions:
            if session.card.incarnation == peer.incarnation and not session.is_closed:
                return session
        self.sessions.append(Session(peer.incarnation))
        return self.sessions[-1]


Program = list[tuple[str, int, int]]
ACTIONS = st.tuples(
    st.sampled_from(KINDS), st.integers(0, NUM_REQUESTS - 1), st.sampled_from([0, 0, 1, 2, 5, -1])
)


@settings(max_examples=100, deadline=None)
@given(program=st.lists(ACTIONS, max_size=20))
@example(program=[("start", 0, 5), ("reject", 0, 0), ("stop", 0, 0)])
def test_no_order_of_events_leaves_a_prefill_worker_computing_for_nobody(program: Program) -> None:
    """Each action is followed by so many turns of the event loop; -1: by a tick of every watch."""

    async def scenario() -> None:
        world = World()
        with pytest.MonkeyPatch.context() as patch:
            for module in (prefill_client, prefill_ladder):
                patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: world.now))
            try:
                for kind, number, num_turns in program:
                    world.act(kind, number)
                    for _ in range(num_turns):
                        await asyncio.sleep(0)
                    if num_turns < 0:
                        await asyncio.sleep(STALL_SECONDS / 2)
                await world.settle()
            finally:
                world.receiver.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))

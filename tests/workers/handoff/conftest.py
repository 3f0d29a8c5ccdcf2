"""Pairs of a sender and a receiver, closed and checked for leaks after each test."""

from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
from handoff_pair import Pair, handoff_threads, wait_until
from memory_transport import FaultPlan, MemoryNetwork, MemoryTransport
from nccl_stand_in import stand_in_transport

from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.transport import Transport

MakePair = Callable[..., Pair]
TwoTransports = tuple[Transport, Transport]


def _memory(plan: FaultPlan | None = None) -> TwoTransports:
    network = MemoryNetwork()
    return MemoryTransport(network, "sender:0", plan), MemoryTransport(network, "receiver:0")


def _gloo() -> TwoTransports:
    return GlooTransport("127.0.0.1"), GlooTransport("127.0.0.1")


def _nccl() -> TwoTransports:
    """The code of the NCCL link; what needs a GPU of each end is in test_nccl.py."""
    return stand_in_transport("127.0.0.1"), stand_in_transport("127.0.0.1")


@pytest.fixture(params=[_gloo, _memory, _nccl], ids=["gloo", "memory", "nccl-stand-in"])
def transports(request: pytest.FixtureRequest) -> Iterator[TwoTransports]:
    """(connecting, accepting)."""
    both = request.param()
    yield both
    for transport in both:
        transport.close()


@pytest.fixture
def make_memory_pair() -> Iterator[MakePair]:
    """Build a pair over memory links with faults; see ``Pair`` for the rest."""
    pairs: list[Pair] = []
    before = handoff_threads()  # of a test that failed, whose end is not this one's to wait for

    def make(plan: FaultPlan | None = None, **options: Any) -> Pair:
        pairs.append(Pair(*_memory(plan), **options))
        return pairs[-1]

    yield make
    _close(pairs, before)


@pytest.fixture
def pair(transports: TwoTransports) -> Iterator[Pair]:
    """A healthy pair over each kind of transport."""
    before = handoff_threads()
    pairs = [Pair(*transports)]
    yield pairs[0]
    _close(pairs, before)


def _close(pairs: list[Pair], before: set[Thread]) -> None:
    for pair in pairs:
        pair.close()
    wait_until(lambda: handoff_threads() <= before)
    for pair in pairs:
        assert pair.target.violations == []

"""Which rung comes next: the decisions alone, with a clock that the test moves.

What the rungs do between real workers is in ``test_ladder_between_workers.py``.
"""

import asyncio
import random
from typing import Any

import pytest

from antiphon.errors import PrefillFailedError
from antiphon.messages import PrefillPeer
from antiphon.workers.prefill_client import Wanted
from antiphon.workers.prefill_ladder import LadderLimits, PrefillLadder, Tries
from antiphon.workers.shunned_peers import ShunnedPeers
from antiphon.workers.worker_metrics import WorkerMetrics

A, B, C = (PrefillPeer(f"ws://{name}", name) for name in "abc")


def tries(shunned: ShunnedPeers, max_attempts: int = 3, deadline: float = 10.0) -> Tries:
    return Tries((A, B, C), shunned, max_attempts, deadline)


def never_shunned() -> ShunnedPeers:
    return ShunnedPeers(lambda: 0.0)


def test_candidates_come_best_first_and_once() -> None:
    these = tries(never_shunned())
    assert [these.next(0.0) for _ in range(4)] == [A, B, C, None]
    assert these.next(0.0, even_shunned=True) is None
    assert these.num_attempts == 3


def test_attempts_are_bounded_in_number_and_time() -> None:
    these = tries(never_shunned(), max_attempts=2)
    assert [these.next(0.0) for _ in range(3)] == [A, B, None]
    these = tries(never_shunned(), deadline=10.0)
    assert [these.next(9.9), these.next(10.0), these.next(11.0, even_shunned=True)] == [
        A,
        None,
        None,
    ]


def test_shunned_candidates_are_passed_over_until_nobody_else_is_left() -> None:
    shunned = never_shunned()
    shunned.failed(A.incarnation)
    these = tries(shunned, max_attempts=3)
    assert [these.next(0.0), these.next(0.0), these.next(0.0)] == [B, C, None]
    assert these.next(0.0, even_shunned=True) == A
    assert these.next(0.0, even_shunned=True) is None


def test_a_candidate_shunned_by_others_meanwhile_is_passed_over() -> None:
    shunned = never_shunned()
    these = tries(shunned)
    assert these.next(0.0) == A
    shunned.failed(B.incarnation)
    assert these.next(0.0) == C
    shunned.succeeded(B.incarnation)
    assert these.next(0.0) == B


def test_no_order_of_events_asks_anyone_twice_or_too_many() -> None:
    rng = random.Random(0)
    for _ in range(500):
        shunned = never_shunned()
        limit = rng.randint(1, 3)
        these = tries(shunned, max_attempts=limit)
        asked = []
        for _ in range(8):
            peer = rng.choice((A, B, C))
            rng.choice((shunned.failed, shunned.succeeded, shunned.leaving))(peer.incarnation)
            found = these.next(0.0, even_shunned=rng.random() < 0.3)
            if found is not None:
                asked.append(found)
        assert len(asked) == len(set(asked)) <= limit


class ComputesHere:
    """Owns requests, and has room to compute every prompt."""

    async def compute_here(self, wanted: Wanted) -> bool:
        return True

    def kv_arrived(self, wanted: Wanted) -> None:
        raise AssertionError("nobody was to be asked")

    def kv_unavailable(self, request_id: str, error: PrefillFailedError) -> None:
        raise AssertionError("there is room here")


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (["busy"], "busy"),
        (["leaving"], "draining"),
        (["failed", "failed"], "shunned"),
        (["failed", "busy"], "busy"),
        (["leaving", "busy"], "busy"),
        (["failed", "leaving"], "draining"),
    ],
)
def test_a_prompt_that_nobody_is_asked_for_is_counted_as_failed_only_if_all_did(
    events: list[str], reason: str
) -> None:
    shunned, metrics = never_shunned(), WorkerMetrics("decode")
    candidates = (A, B)[: len(events)]
    for peer, event in zip(candidates, events, strict=True):
        getattr(shunned, event)(peer.incarnation)
    nobody: Any = None

    async def scenario() -> None:
        ladder = PrefillLadder(nobody, shunned, LadderLimits(), metrics, ComputesHere())
        ladder.start(Wanted("request", [1, 2], [0], 0), candidates)
        _, climb = ladder._climbs["request"]
        await asyncio.wait_for(climb, 5)

    asyncio.run(scenario())
    assert metrics.count("antiphon_prefill_fallbacks_total", reason=reason) == 1

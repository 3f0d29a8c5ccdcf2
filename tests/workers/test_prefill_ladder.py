"""Which rung comes next: the decisions alone, with a clock that the test moves.

What the rungs do between real workers is in ``test_ladder_between_workers.py``.
"""

import random

from antiphon.messages import PrefillPeer
from antiphon.workers.prefill_ladder import Tries
from antiphon.workers.shunned_peers import ShunnedPeers

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

"""What a decode worker is told of a request, and what people are told of the workers."""

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from antiphon.deployment.replay import Replay
from antiphon.messages import PrefillPeer, Submit, WorkerCard
from antiphon.router.decision import Decision
from antiphon.router.telemetry_view import ClusterView


def submission(request_id: str, replay: Replay, decision: Decision) -> Submit:
    """The message that a decision comes to."""
    # Clients may name their requests, and two may choose one name: what workers see is unique.
    request_id = f"{request_id}-{secrets.token_hex(8)}"
    cards = (decision.prefill, *decision.alternates) if decision.prefill else ()
    candidates = tuple(PrefillPeer.of(card) for card in cards)
    return Submit(request_id, replay.prompt_token_ids, replay.sampling, candidates)


def describe(view: ClusterView, cards: Iterable[WorkerCard]) -> list[dict[str, Any]]:
    """Workers with their load, by role and replica id."""
    described = []
    for card in cards:
        known = view.get(card.incarnation)
        load = msgspec.to_builtins(known.load) if known is not None else None
        described.append({**card.public(), "load": load})
    return sorted(described, key=lambda worker: (worker["role"], worker["replica_id"]))

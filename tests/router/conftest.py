"""Builders of cards, loads and telemetry for the router's tests."""

from collections.abc import Iterable

import pytest

from antiphon.block_hash import BlockHash
from antiphon.messages import Load, Role, Telemetry, WorkerCard
from antiphon.router.telemetry_view import ClusterView


class Cluster:
    """Workers that exist on paper."""

    idle = Load(
        num_running=0,
        num_waiting=0,
        num_free_blocks=1000,
        num_queued_tokens=0,
        prefill_tokens_per_second=1000.0,
        decode_step_seconds=0.05,
    )

    def card(
        self, name: str, role: Role, incarnation: str | None = None, block_size: int = 16
    ) -> WorkerCard:
        return WorkerCard(
            replica_id=name,
            incarnation=incarnation or name,
            role=role,
            url=f"ws://{name}/session",
            model_fingerprint="model",
            block_size=block_size,
            num_blocks=1000,
            max_context_tokens=8192,
            kv_bytes_per_token=46_080,
            wire_bytes_per_token=46_080,
            pid=1,
            node="node",
        )

    def snapshot(
        self, load: Load = idle, stored: Iterable[BlockHash] = (), sequence: int = 0
    ) -> Telemetry:
        return Telemetry(sequence, is_snapshot=True, stored=list(stored), removed=[], load=load)

    def delta(
        self,
        sequence: int,
        load: Load = idle,
        stored: Iterable[BlockHash] = (),
        removed: Iterable[BlockHash] = (),
    ) -> Telemetry:
        return Telemetry(
            sequence, is_snapshot=False, stored=list(stored), removed=list(removed), load=load
        )

    def view(self, prefill: int = 0, decode: int = 0, colocated: int = 0) -> ClusterView:
        """Idle, empty workers: p0, p1..., d0, d1..., c0, c1..."""
        view = ClusterView()
        pools = ((Role.PREFILL, prefill), (Role.DECODE, decode), (Role.COLOCATED, colocated))
        for role, number in pools:
            for i in range(number):
                name = f"{role[0]}{i}"
                view.join(self.card(name, role))
                view.apply(name, self.snapshot(), now=0.0)
        return view


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()

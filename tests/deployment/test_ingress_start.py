"""An ingress meets the workers before Serve sends it requests, and does not wait for them long."""

import asyncio
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pools import start
from tiny_folder import save_tiny_model
from tiny_models import tiny_model

from antiphon.config import AntiphonConfig, RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.messages import Role
from antiphon.workers.model_files import fingerprint

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from antiphon.deployment import ingress


def test_requests_are_taken_once_the_workers_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "_MEET_SECONDS", 30.0)

    async def scenario() -> None:
        worker = await start(Role.DECODE, tiny_model("llama"))
        backend = ClusterBackend("tiny", RouterConfig(), {Role.DECODE}, IngressMetrics())
        meeting = asyncio.create_task(ingress._meet_workers(backend))
        await asyncio.wait({meeting}, timeout=0.2)
        assert not meeting.done()
        backend.set_workers(Role.DECODE, {worker.card.replica_id: worker.card})
        await asyncio.wait_for(meeting, 20)
        assert backend.is_ready()[0]
        await backend.close()
        await worker.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_where_everything_starts_the_ingress_is_there_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingress, "_MEET_SECONDS", 0.2)

    async def scenario() -> None:
        backend = ClusterBackend("tiny", RouterConfig(), {Role.DECODE}, IngressMetrics())
        began_at = time.monotonic()
        await ingress._meet_workers(backend)
        assert time.monotonic() - began_at < 10
        assert not backend.is_ready()[0]

    asyncio.run(scenario())


def test_in_an_update_of_the_model_the_ingress_waits_while_the_one_before_can_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingress, "_MEET_SECONDS", 0.0)

    async def scenario() -> None:
        worker = await start(Role.DECODE, tiny_model("llama"))
        backend = ClusterBackend("tiny", RouterConfig(), {Role.DECODE}, IngressMetrics())
        backend.sessions.model_fingerprint = "another"
        backend.set_workers(Role.DECODE, {worker.card.replica_id: worker.card})
        meeting = asyncio.create_task(ingress._meet_workers(backend))
        await asyncio.wait({meeting}, timeout=0.2)
        assert not meeting.done()
        backend.set_workers(Role.DECODE, {})
        await asyncio.wait_for(meeting, 20)
        assert not backend.is_ready()[0]
        await worker.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_workers_are_used_that_have_the_model_of_this_ingress(
    tmp_path: Path, smollm2_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "tiny", smollm2_path)
    config = AntiphonConfig.model_validate({"model": {"source": str(folder)}})

    async def ask_ingresses(*_: Any) -> Sequence[Any]:
        return []

    async def scenario() -> None:
        placement = ingress.Placement("ingress#1", "127.0.0.1", ask_ingresses)
        process = ingress.IngressProcess(config, {}, placement)
        async with process._lifespan(process.app):
            assert process.backend.sessions.model_fingerprint == fingerprint(folder)

    asyncio.run(asyncio.wait_for(scenario(), 60))

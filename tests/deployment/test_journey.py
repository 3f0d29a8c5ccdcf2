"""One choice's way through ingress and workers: every second of its first token has one name."""

import asyncio
import time

import pytest
from memory_transport import Fault, FaultPlan
from pools import until
from tiny_models import tiny_model
from two_pools import backend_over, close, pair

from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.journey import PARTS, Journey
from antiphon.messages import SamplingParams
from antiphon.request_timing import RequestTiming
from antiphon.workers.worker import Worker

PROMPT = [5 + i for i in range(48)]
ROUTE_SECONDS = 0.25


async def travel(backend: ClusterBackend, prompt: list[int]) -> Journey:
    """Generate as the HTTP layer does, for a request that arrived some time ago."""
    journey = Journey(time.monotonic() - ROUTE_SECONDS)
    sampling = SamplingParams(3, temperature=0)
    async for output in backend.generate("r", prompt, sampling, journey):
        journey.took(len(output.token_ids), time.monotonic())
    return journey


def assert_adds_up(journey: Journey) -> dict[str, float]:
    parts = journey.parts()
    assert tuple(parts) == PARTS
    assert min(parts.values()) >= 0, parts
    assert sum(parts.values()) == pytest.approx(journey.ttft_seconds)
    assert parts["route"] >= ROUTE_SECONDS
    assert parts["first_step"] > 0 or parts["prefill"] > 0
    return parts


def test_the_parts_of_each_path_add_up() -> None:
    model = tiny_model("llama")

    async def scenario(prefill: Worker, decode: Worker, backend: ClusterBackend) -> None:
        remote = await travel(backend, PROMPT)
        parts = assert_adds_up(remote)
        assert parts["prefill"] > 0
        assert parts["transfer"] > 0
        timing = remote.timing
        assert timing is not None
        assert timing.remote is not None
        assert timing.remote.worker == prefill.card.replica_id
        assert timing.remote.num_sent_tokens == len(PROMPT) - 1
        assert timing.remote.compute == pytest.approx(parts["prefill"])
        assert (timing.remote.num_cached_tokens, timing.failed) == (0, ())

        cached = await travel(backend, [*PROMPT, 3])
        assert cached.timing is not None
        assert cached.timing.prefill_path == "local"
        assert assert_adds_up(cached)["transfer"] == 0

        await prefill.close()
        await until(lambda: not backend._view.prefill_workers)
        alone = await travel(backend, PROMPT[::-1])
        assert alone.timing is not None
        assert alone.timing.prefill_path == "local"
        assert assert_adds_up(alone)["prefill"] > 0

    async def whole() -> None:
        prefill, decode, client = await pair(model)
        backend = await backend_over(prefill, decode)
        await scenario(prefill, decode, backend)
        await close(client.session, backend, decode)

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_failed_attempt_is_told_and_lies_before_the_computing() -> None:
    model = tiny_model("llama")

    async def whole() -> None:
        prefill, decode, client = await pair(model, FaultPlan({1: Fault.CORRUPT_PAYLOAD}))
        backend = await backend_over(prefill, decode)
        journey = await travel(backend, PROMPT)
        assert journey.timing is not None
        assert journey.timing.prefill_path == "fallback"
        (failed,) = journey.timing.failed
        assert (failed.worker, failed.outcome) == (prefill.card.replica_id, "rejected")
        assert assert_adds_up(journey)["prefill_queue"] >= failed.seconds
        await close(client.session, backend, prefill, decode)

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_tokens_that_leave_together_share_the_gap_before_them() -> None:
    journey = Journey(arrived_at=10.0)
    assert journey.tpot_seconds is None
    assert journey.took(1, 11.0) is None
    assert journey.took(0, 11.5) is None
    assert journey.took(3, 12.5) == 1.5
    assert journey.ttft_seconds == 1.0
    assert journey.tpot_seconds == 0.5
    assert (journey.num_tokens, journey.parts()) == (4, {})


def test_only_the_first_token_is_accounted_for() -> None:
    journey = Journey(arrived_at=10.0)
    journey.answered(RequestTiming("local", queue=1.0))
    assert journey.timing is None  # no attempt was noted: nothing to hold it against

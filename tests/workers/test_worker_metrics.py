"""What workers count over one hand-off; nothing twice, and nothing that outlives its link."""

import asyncio
import time

import pytest
from pools import assert_idle, peer_of, until
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import tiny_model
from two_pools import backend_over, close, generate, pair

from antiphon.metrics import Buckets, Metrics
from antiphon.workers.worker import Worker

PROMPT = [5 + i for i in range(41)]
OUTPUT_TOKENS = 5


def value(worker: Worker, name: str, **labels: str) -> float:
    return worker.metrics.count(name, **labels)


def links(worker: Worker) -> dict[tuple[str, str], float]:
    """Bytes by direction and peer."""
    (family,) = (
        f for f in worker.metrics.registry.collect() if f.name == "antiphon_handoff_link_bytes"
    )
    return {(s.labels["direction"], s.labels["peer"]): s.value for s in family.samples}


def test_a_handoff_is_counted_where_it_happens() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        await client.finish(client.submit(PROMPT, OUTPUT_TOKENS, peer_of(prefill)))
        await assert_idle(prefill, decode)
        assert value(prefill, "antiphon_prompt_tokens_total") == len(PROMPT) - 1
        assert value(decode, "antiphon_prompt_tokens_total") == 0
        assert value(decode, "antiphon_received_tokens_total") == len(PROMPT) - 1
        assert value(decode, "antiphon_generation_tokens_total") == OUTPUT_TOKENS
        assert value(decode, "antiphon_worker_requests_total", outcome="length") == 1
        assert value(decode, "antiphon_handoff_transfer_seconds_count") == 1
        steps = "antiphon_engine_step_seconds_count"
        assert value(decode, steps, kind="decode") == OUTPUT_TOKENS
        assert value(prefill, steps, kind="prefill") == 3
        num_bytes = (len(PROMPT) - 1) * decode.card.wire_bytes_per_token
        assert links(prefill) == {("sent", decode.card.replica_id): num_bytes}
        assert links(decode) == {("received", prefill.card.replica_id): num_bytes}
        await client.finish(client.submit(PROMPT, OUTPUT_TOKENS))
        assert value(decode, "antiphon_cached_tokens_total") == 32
        assert value(decode, "antiphon_prompt_tokens_total") == len(PROMPT) - 33 + 1
        await prefill.close()
        await until(lambda: not links(decode))
        await close(client.session, decode)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_state_is_as_it_is_and_the_text_is_prometheus_own() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        blocks = "antiphon_kv_cache_blocks"
        assert value(decode, blocks, state="free") == decode.card.num_blocks
        assert value(decode, "antiphon_engine_last_step_age_seconds") == 0
        decode.engine.call(lambda _: time.sleep(0.2))
        client.submit(PROMPT, 2)
        await until(lambda: value(decode, "antiphon_requests_waiting") == 1, 10)
        await until(lambda: value(decode, "antiphon_engine_last_step_age_seconds") > 0.05, 10)
        await until(lambda: len(client.ended) == 1)
        await assert_idle(decode)
        cached = value(decode, blocks, state="cached")
        assert cached == len(PROMPT) // 16
        assert value(decode, blocks, state="free") == decode.card.num_blocks - cached
        assert value(decode, "antiphon_kv_cache_usage_ratio") == 0
        assert value(decode, "antiphon_draining") == 0
        assert await decode.drain(1.0)
        assert value(decode, "antiphon_draining") == 1
        for worker in (prefill, decode):
            families = list(text_string_to_metric_families(worker.metrics.render().decode()))
            roles = {s.labels["role"] for family in families for s in family.samples}
            assert roles == {worker.card.role.value}
        await close(client.session, prefill, decode)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_link_that_was_given_up_is_in_quarantine_until_it_is_closed() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        await client.finish(client.submit(PROMPT, 1, peer_of(prefill)))
        receiver = decode.generate.receiver
        name = "antiphon_handoff_quarantined_bytes"
        assert value(decode, name) == 0
        (link,) = receiver._links
        receiver.expect("0" * 32, link.link_id, [0], 0, 1)  # else it would be closed at once
        receiver.retire(link.link_id)
        assert value(decode, name) > 0
        receiver.cancel("0" * 32)
        await until(lambda: value(decode, name) == 0)
        await close(client.session, prefill, decode)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_decode_step_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One histogram for a step, one for each stream's tokens, and no label is looked up."""
    model = tiny_model("llama")
    observed: list[str] = []
    observe = Buckets.observe

    def counting(self: Buckets, *args: object, **more: object) -> None:
        observed.append("")
        observe(self, *args, **more)  # type: ignore[arg-type]

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        await client.finish(client.submit([5, 6, 7], 1))
        monkeypatch.setattr(Buckets, "observe", counting)
        before = decode.engine.stats.num_steps
        await client.finish(*(client.submit([5, 6, 7 + i], 20) for i in range(4)))
        assert len(observed) == decode.engine.stats.num_steps - before
        await close(client.session, prefill, decode)

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize(
    ("side", "name", "labels"),
    [
        ("ingress", "antiphon_requests_total", {"outcome": "failed"}),
        ("ingress", "antiphon_replays_total", {"reason": "lost", "outcome": "failed"}),
        ("ingress", "antiphon_router_sessions_lost_total", {"pool": "prefill"}),
        ("decode", "antiphon_prefill_attempts_total", {"outcome": "stalled"}),
        ("decode", "antiphon_prefill_fallbacks_total", {"reason": "shunned"}),
        ("decode", "antiphon_handoff_discarded_segments_total", {"reason": "checksum"}),
    ],
)
def test_what_alerts_are_about_counts_from_zero(
    side: str, name: str, labels: dict[str, str]
) -> None:
    """Prometheus sees no increase in a sample that was not there before."""
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        backend = await backend_over(prefill, decode)
        metrics: Metrics = backend._metrics if side == "ingress" else decode.metrics
        sample = metrics.registry.get_sample_value(name, {"role": side, **labels})
        assert sample == 0
        pools = {"role": "ingress", "pool": "colocated"}
        workers = backend._metrics.registry.get_sample_value("antiphon_router_workers", pools)
        assert workers is None, "no such pool is configured"
        await close(client.session, backend, prefill, decode)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_labels_of_workers_go_with_them() -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        prefill, decode, client = await pair(model)
        backend = await backend_over(prefill, decode)
        metrics: Metrics = backend._metrics
        await generate(backend, PROMPT)
        index = "antiphon_router_index_blocks"
        name = decode.card.replica_id
        num_blocks = (len(PROMPT) + 7) // 16  # the last of the eight tokens has no KV
        await until(lambda: metrics.count(index, worker=name) == num_blocks, 10)
        assert metrics.count("antiphon_router_workers", pool="decode") == 1
        assert metrics.count("antiphon_router_decisions_total", reason="remote") == 1
        assert metrics.count("antiphon_router_decision_seconds_count") == 1
        actual = "antiphon_router_actual_time_to_first_token_seconds_total"
        assert metrics.count(actual, reason="remote") > 0
        await decode.close()
        await until(lambda: metrics.count("antiphon_router_workers", pool="decode") == 0, 10)
        assert f'worker="{name}"'.encode() not in metrics.render()
        assert metrics.count("antiphon_router_sessions_lost_total", pool="decode") == 1
        await close(client.session, backend, prefill)

    asyncio.run(asyncio.wait_for(scenario(), 60))

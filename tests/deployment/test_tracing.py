"""Traces of requests through real workers, as a collector receives them."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from collector import Collector, Received, collecting
from crew import watch
from memory_transport import Fault, FaultPlan
from pools import start, until
from tiny_models import tiny_model
from two_pools import backend_over, close, http_client, pair

from antiphon.config import TracingConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal
from antiphon.errors import WorkerBusyError
from antiphon.messages import Role
from antiphon.tracing import effective, start_tracing
from antiphon.workers.batch import Batch
from antiphon.workers.worker import Worker

PROMPT = [40 + i for i in range(48)]
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
PHASES = ["queue", "prefill_queue", "prefill", "transfer", "decode_queue", "first_step", "generate"]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with collecting() as collector:
        yield collector


@dataclass
class System:
    """Two pools and an ingress that trace."""

    prefill: Worker
    decode: Worker
    backend: ClusterBackend
    http: httpx.AsyncClient
    metrics: IngressMetrics
    journal: Journal

    async def ask(self, sampled: str = "01", **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, **fields}
        # Without a flag the header is one that nobody can read.
        parent = f"00-{TRACE_ID}-{PARENT_ID}-{sampled}" if sampled else "00-x-?"
        headers = {"X-Request-Id": "demo", "tracestate": "vendor=x", "traceparent": parent}
        return await self.http.post("/v1/completions", json=body, headers=headers)


@asynccontextmanager
async def system(config: TracingConfig, plan: FaultPlan | None = None) -> AsyncIterator[System]:
    """Leaving it sends what spans there are."""
    metrics = IngressMetrics()
    tracing = start_tracing(config, "ingress", "i0", metrics)
    journal = Journal(tracing, "i0", 100)
    prefill, decode, client = await pair(tiny_model("llama"), plan, tracing=config)
    backend = await backend_over(prefill, decode)
    async with asyncio.timeout(60), http_client(backend, journal) as http:
        yield System(prefill, decode, backend, http, metrics, journal)
        await close(client.session, backend, prefill, decode)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


def config_for(collector: Collector, **more: Any) -> TracingConfig:
    return effective(TracingConfig(endpoint=collector.url, **more), {})


def test_one_trace_goes_through_both_pools(collector: Collector) -> None:
    async def scenario() -> None:
        async with system(config_for(collector)) as running:
            assert (await running.ask()).status_code == 200
            workers.update(decode=running.decode, prefill=running.prefill)

    workers: dict[str, Worker] = {}
    asyncio.run(scenario())
    spans = collector.spans
    assert {span.trace_id for span in spans} == {TRACE_ID}
    assert {span.attributes["antiphon.request_id"] for span in spans} == {"demo"}
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)

    root = collector.one("POST /v1/completions")
    chain = [root]
    for name in ("choice", "attempt", "decode worker", "prefill attempt", "prefill worker"):
        below = collector.below(chain[-1])
        chain.append(next(span for span in below if span.name == name))
        if name == "choice":
            assert [span.name for span in collector.below(chain[-1])] == [
                "prepare", "choose", "attempt",
            ]  # fmt: skip
    assert root.parent_id == PARENT_ID
    assert [span.kind for span in chain] == [
        "server", "internal", "client", "server", "client", "server",
    ]  # fmt: skip
    for span in spans:
        if span is not root:
            assert by_id[span.parent_id].holds(span), (span.name, by_id[span.parent_id].name)
        assert span.status == "unset"

    decode, prefill = chain[3], chain[5]
    phases = [span for span in collector.below(decode) if span.kind == "internal"]
    assert [span.name for span in phases] == PHASES
    for before, after in pairwise(phases):
        assert abs(after.began_ns - before.ended_ns) < 1_000  # rounding
    assert [span.name for span in collector.below(prefill)][:2] == ["queue", "compute"]
    num_bytes = (len(PROMPT) - 1) * workers["decode"].card.wire_bytes_per_token
    assert collector.one("transfer", antiphon__num_bytes=num_bytes).parent_id == prefill.span_id
    assert {span.trace_state for span in spans} == {"vendor=x"}
    page = (Path(__file__).parents[2] / "docs/tracing.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall("`([^`]+)`", row)}
    assert {span.name for span in spans} - {root.name} == listed - {"POST /v1/..."}
    check_attributes(root, chain[1], decode, prefill, workers)
    # Neither tokens nor the text of the prompt.
    assert not any(bytes(PROMPT[:8]) in body for body in collector.bodies)


def check_attributes(
    root: Received, choice: Received, decode: Received, prefill: Received, workers: dict
) -> None:
    assert root.attributes.items() >= {
        "http.request.method": "POST", "http.route": "/v1/completions",
        "http.response.status_code": 200, "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny", "gen_ai.request.max_tokens": 4,
        "gen_ai.usage.input_tokens": 48, "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"], "antiphon.outcome": "length",
    }.items()  # fmt: skip
    assert choice.attributes["antiphon.prefill_path"] == "remote"
    assert choice.attributes["gen_ai.response.time_to_first_chunk"] > 0
    for span, name in ((decode, "decode"), (prefill, "prefill")):
        worker = workers[name]
        assert span.attributes["antiphon.worker"] == worker.card.replica_id
        assert span.resource.items() >= {
            "service.name": "antiphon", "antiphon.role": name,
            "service.instance.id": worker.card.replica_id,
        }.items()  # fmt: skip


def test_what_is_not_sampled_leaves_no_trace(collector: Collector) -> None:
    async def scenario() -> None:
        config = config_for(collector, sample_ratio=0)
        async with system(config) as running:
            assert (await running.ask(sampled="00")).status_code == 200
            assert (await running.ask(sampled="")).status_code == 200
            assert not running.journal.find("demo")[0].trace_id
            assert collector.bodies == []
            # A client that samples decides for us.
            assert (await running.ask(sampled="01")).status_code == 200
            assert running.journal.find("demo")[0].trace_id == TRACE_ID

    asyncio.run(scenario())
    assert len(collector.named("POST /v1/completions")) == 1


def test_a_trace_begins_here_without_a_client_s(collector: Collector) -> None:
    async def scenario() -> None:
        async with system(config_for(collector)) as running:
            assert (await running.ask(sampled="", temperature=9)).status_code == 400
            assert (await running.ask(sampled="", n=2)).status_code == 200

    asyncio.run(scenario())
    refused, answered = sorted(collector.named("POST /v1/completions"), key=lambda s: s.began_ns)
    assert refused.parent_id == answered.parent_id == ""
    assert refused.trace_id != answered.trace_id
    assert (refused.attributes["antiphon.outcome"], refused.status) == ("invalid", "unset")
    assert refused.attributes["http.response.status_code"] == 400
    assert [span.name for span in collector.below(answered)] == ["choice", "choice"]


def test_a_failed_prefill_attempt_is_in_the_trace(collector: Collector) -> None:
    async def scenario() -> None:
        plan = FaultPlan({1: Fault.CORRUPT_PAYLOAD})
        async with system(config_for(collector), plan) as running:
            assert (await running.ask()).status_code == 200

    asyncio.run(scenario())
    attempt = collector.one("prefill attempt")
    assert (attempt.status, attempt.attributes["error.type"]) == ("error", "rejected")
    decode = collector.one("decode worker")
    assert attempt.parent_id == decode.span_id
    assert decode.attributes["antiphon.prefill_path"] == "fallback"
    assert decode.status == collector.one("POST /v1/completions").status == "unset"
    assert collector.one("prefill worker").attributes["antiphon.outcome"] == "given_up"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(RuntimeError("a bug"), "failed"), (WorkerBusyError("filled since"), "refused")],
)
def test_what_a_prefill_worker_could_not_do_is_an_error_there(
    collector: Collector, error: Exception, outcome: str
) -> None:
    async def scenario() -> None:
        async with system(config_for(collector)) as running:
            watch(running.prefill, fail)
            assert (await running.ask()).status_code == 200

    def fail(batch: Batch) -> None:
        raise error

    asyncio.run(scenario())
    prefill = collector.one("prefill worker")
    assert prefill.attributes["antiphon.outcome"] == outcome
    assert prefill.status == "error"


def test_a_replay_is_another_attempt_in_the_same_trace(collector: Collector) -> None:
    async def scenario() -> None:
        config, model = config_for(collector), tiny_model("llama")
        tracing = start_tracing(config, "ingress", "i0", IngressMetrics())
        assert tracing is not None
        journal = Journal(tracing, "i0", 100)
        workers = [await start(Role.COLOCATED, model, tracing=config) for _ in range(2)]
        backend = await backend_over(*workers)
        async with asyncio.timeout(60), http_client(backend, journal) as http:
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
            asking = asyncio.create_task(http.post("/v1/completions", json=body))
            await until(lambda: any(j.num_tokens > 3 for r in journal._open for j in r.journeys))
            (owner,) = [worker for worker in workers if worker.num_requests]
            for session in tuple(owner._server.sessions):
                session.cut()
            assert (await asking).status_code == 200
        await close(backend, *workers)
        await asyncio.to_thread(tracing.close)

    asyncio.run(scenario())
    choice = collector.one("choice")
    attempts = [span for span in collector.below(choice) if span.name == "attempt"]
    assert [span.status for span in attempts] == ["error", "unset"]
    assert attempts[0].attributes["error.type"] == "lost"
    workers = {span.parent_id: span for span in collector.named("decode worker")}
    assert workers.keys() == {span.span_id for span in attempts}
    outcomes = [workers[span.span_id].attributes["antiphon.outcome"] for span in attempts]
    assert outcomes == ["aborted", "length"]
    asked = [span.attributes["antiphon.worker"] for span in attempts]
    assert asked == [workers[span.span_id].attributes["antiphon.worker"] for span in attempts]
    assert len({*asked}) == 2


def test_requests_do_not_wait_for_a_collector_that_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")

    async def scenario() -> None:
        async with system(TracingConfig(endpoint="http://127.0.0.1:9/v1/traces")) as running:
            for _ in range(3):
                assert (await running.ask()).status_code == 200
            failed = {"outcome": "failed"}
            await until(lambda: running.metrics.count("antiphon_trace_spans_total", **failed) > 0)

    asyncio.run(scenario())

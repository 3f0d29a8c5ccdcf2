"""What an ingress counts: every request once, by what its client saw; latencies and targets."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from scripted_backend import CharTokenizer, Gate, ScriptedBackend, says, serving

from antiphon.config import RouterConfig
from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.deployment.http_app import create_app
from antiphon.deployment.http_metrics import RequestMetricsMiddleware
from antiphon.deployment.ingress_metrics import IngressMetrics
from antiphon.deployment.journal import Journal
from antiphon.deployment.journey import Journey
from antiphon.errors import WorkerBusyError, WorkerLostError
from antiphon.messages import Role
from antiphon.request_timing import RemotePrefill, RequestTiming

OUTCOMES = "antiphon_requests_total"


def outcomes(metrics: IngressMetrics) -> dict[str, float]:
    (family,) = (f for f in metrics.registry.collect() if f.name == "antiphon_requests")
    counts = {s.labels["outcome"]: s.value for s in family.samples if s.name == OUTCOMES}
    return {outcome: count for outcome, count in counts.items() if count}


@contextlib.contextmanager
def endpoint(backend: ScriptedBackend, metrics: IngressMetrics) -> Iterator[httpx.Client]:
    app = create_app(backend, CharTokenizer(), max_concurrent_requests=2, metrics=metrics)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def body(**more: object) -> dict[str, object]:
    return {"model": "org/tiny", "prompt": "abc", **more}


def wait_until_over(metrics: IngressMetrics) -> None:
    deadline = time.monotonic() + 10
    while metrics.count("antiphon_requests_in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("script", "request_body", "status", "outcome"),
    [
        ([says("hi", "stop")], body(), 200, "stop"),
        ([says("hi", "length")], body(stream=True), 200, "length"),
        ([says("hi", "stop")], body(n=2), 200, "stop"),
        ([says("hi there"), Gate()], body(stop=["hi"]), 200, "stop"),
        ([says("hi")], body(temperature=7), 400, "invalid"),
        ([says("hi")], body(prompt="a" * 200), 400, "context_length"),
        ([says("hi")], body(model="gpt-9"), 404, "unknown_model"),
        ([says("hi")], body(logprobs=3), 400, "unsupported"),
        ([says("hi")], body(no_such_thing=3), 400, "invalid"),
        ([says("hi")], {"prompt": "once"}, 400, "invalid"),
        ([WorkerBusyError("full")], body(stream=True), 503, "busy"),
        ([says("hi")], body(n=3), 400, "invalid"),
        ([WorkerLostError("gone")], body(), 502, "failed"),
        ([RuntimeError("a fault")], body(), 500, "failed"),
    ],
)
def test_each_request_is_counted_once(
    script: list, request_body: dict, status: int, outcome: str
) -> None:
    backend, metrics = ScriptedBackend(), IngressMetrics()
    backend.plays(*script)
    with endpoint(backend, metrics) as client:
        assert client.post("/v1/completions", json=request_body).status_code == status
        wait_until_over(metrics)
        assert client.get("/v1/models").status_code == 200  # is no generation request
        assert client.get("/v1/completions").status_code == 405
    assert outcomes(metrics) == {outcome: 1}
    finished = int(outcome in ("stop", "length"))
    assert metrics.count("antiphon_e2e_request_latency_seconds_count") == finished
    assert metrics.count("antiphon_request_prompt_tokens_sum") == 3 * finished


def test_an_error_in_a_stream_is_a_failure() -> None:
    backend, metrics, gate = ScriptedBackend(), IngressMetrics(), Gate()
    backend.plays(says("hi"), gate, WorkerLostError("gone"))
    with endpoint(backend, metrics) as client:
        with client.stream("POST", "/v1/completions", json=body(stream=True)) as answer:
            assert answer.status_code == 200
            for _ in answer.iter_lines():
                gate.open()
        wait_until_over(metrics)
    assert outcomes(metrics) == {"failed": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_counted_as_aborted(stream: bool) -> None:
    backend, metrics, gate = ScriptedBackend(), IngressMetrics(), Gate()
    backend.plays(says("hi"), gate, says("!", "stop"))
    with endpoint(backend, metrics) as client:
        with (
            pytest.raises(httpx.ReadTimeout),
            client.stream(
                "POST", "/v1/completions", json=body(stream=stream), timeout=0.3
            ) as answer,
        ):
            answer.read()
        wait_until_over(metrics)
        gate.open()
    assert outcomes(metrics) == {"aborted": 1}


@pytest.mark.parametrize(
    ("noted", "outcome"), [({}, "aborted"), ({"antiphon.outcome": "stop"}, "stop")]
)
def test_serve_cancels_a_request_whose_client_has_gone(noted: dict, outcome: str) -> None:
    metrics = IngressMetrics()

    async def never(scope, receive, send) -> None:
        scope.update(noted)
        await asyncio.sleep(60)

    async def scenario() -> None:
        middleware = RequestMetricsMiddleware(never, metrics, Journal())
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [],
            "antiphon.request_id": "r", "antiphon.arrived_at": 0.0,
        }  # fmt: skip
        serving_it = asyncio.create_task(middleware(scope, None, None))
        await asyncio.sleep(0)
        serving_it.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving_it

    asyncio.run(scenario())
    assert outcomes(metrics) == {outcome: 1}
    assert metrics.count("antiphon_requests_in_progress") == 0


def test_a_request_is_in_progress_once_it_has_come_whole() -> None:
    """However long a client takes to send one, it waits for nobody here."""
    backend, metrics, gate = ScriptedBackend(), IngressMetrics(), Gate()
    backend.plays(gate, says("hi", "stop"))
    app = create_app(backend, CharTokenizer(), max_concurrent_requests=2, metrics=metrics)
    document = json.dumps(body()).encode()

    async def scenario() -> None:
        asked, rest = asyncio.Event(), asyncio.Event()

        async def upload() -> AsyncIterator[bytes]:
            yield document[:9]
            asked.set()
            await rest.wait()
            yield document[9:]

        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            asking = asyncio.create_task(client.post("/v1/completions", content=upload()))
            await asked.wait()
            assert metrics.count("antiphon_requests_in_progress") == 0
            rest.set()
            while not backend.calls:
                await asyncio.sleep(0.001)
            assert metrics.count("antiphon_requests_in_progress") == 1
            gate.open()
            assert (await asking).status_code == 200

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert metrics.count("antiphon_requests_in_progress") == 0
    assert outcomes(metrics) == {"stop": 1}


def travelled(ttft: float, gaps: list[float]) -> tuple[IngressMetrics, Journey]:
    """A choice's tokens, one by one, under targets of 1 and 0.1 s."""
    metrics = IngressMetrics(RouterConfig(target_ttft_seconds=1.0, target_itl_seconds=0.1))
    journey = Journey(arrived_at=100.0)
    journey.timing, journey.first_sent_at = RequestTiming("local", queue=ttft), 100.0
    now = 100.0 + ttft
    for gap in (0.0, *gaps):
        now += gap
        metrics.tokens_left(journey, 1, now)
    metrics.choice_ended(journey)
    return metrics, journey


@pytest.mark.parametrize(
    ("ttft", "gaps", "met"),
    [
        (0.9, [0.05, 0.12], "both"),  # the mean counts
        (0.9, [], "both"),
        (0.9, [0.3], "itl_missed"),
        (1.1, [0.05], "ttft_missed"),
        (1.1, [0.3], "neither"),
    ],
)
def test_goodput(ttft: float, gaps: list[float], met: str) -> None:
    metrics, _ = travelled(ttft, gaps)
    assert metrics.count("antiphon_requests_by_target_total", met=met) == 1
    assert metrics.count("antiphon_target_seconds", target="itl") == 0.1
    assert metrics.count("antiphon_inter_token_latency_seconds_count") == len(gaps)
    assert metrics.count("antiphon_time_to_first_token_seconds_sum", path="local") == pytest.approx(
        ttft
    )
    parts = "antiphon_time_to_first_token_part_seconds_sum"
    assert metrics.count(parts, part="submit") == pytest.approx(ttft)


def test_no_target_no_goodput() -> None:
    metrics = IngressMetrics()
    metrics.choice_ended(Journey(0.0))
    assert b"antiphon_requests_by_target_total{" not in metrics.render()
    assert b"antiphon_target_seconds{" not in metrics.render()


def test_how_many_workers_serve_is_to_run_is_asked_at_each_scrape() -> None:
    metrics = IngressMetrics()
    backend = ClusterBackend("tiny", RouterConfig(), {Role.DECODE}, metrics)
    wanted: dict[Role, int] = {}
    backend.count_wanted(lambda: wanted)
    assert b"antiphon_workers_wanted{" not in metrics.render()
    for number in (3, 4):
        wanted[Role.DECODE] = number
        assert metrics.count("antiphon_workers_wanted", pool="decode") == number


def test_only_a_first_token_that_a_prefill_worker_worked_for_waited_for_a_transfer() -> None:
    """Or a quantile over the others, which waited 0 s, would hide it."""
    metrics = IngressMetrics()
    remote = RequestTiming("remote", transfer=2.0, remote=RemotePrefill("p", 0.0, 0.0, 2.0, 0, 9))
    for timing in [remote, *[RequestTiming("local", prefill=0.1)] * 9]:
        journey = Journey(arrived_at=100.0)
        journey.timing, journey.first_sent_at = timing, 100.0
        metrics.tokens_left(journey, 1, 103.0)
    parts = "antiphon_time_to_first_token_part_seconds"
    assert metrics.count(f"{parts}_count", part="return") == 10
    assert metrics.count(f"{parts}_count", part="transfer") == 1
    assert metrics.count(f"{parts}_sum", part="transfer") == 2.0


def test_tokens_that_leave_together_share_their_gap() -> None:
    metrics, journey = travelled(0.5, [0.1])
    metrics.tokens_left(journey, 4, journey.last_token_at + 0.4)
    assert metrics.count("antiphon_inter_token_latency_seconds_count") == 5
    assert metrics.count("antiphon_inter_token_latency_seconds_sum") == pytest.approx(0.5)

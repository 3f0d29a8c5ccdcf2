"""Builds a worker around a loaded model: engine, links, session server, metrics."""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Sequence

import torch

from antiphon import __version__
from antiphon.config import HandoffConfig
from antiphon.messages import Role, WorkerCard
from antiphon.tracing import start_tracing
from antiphon.vllm_names import VllmCollector
from antiphon.workers.engine import Engine
from antiphon.workers.engine_metrics import EngineCollector, worker_state
from antiphon.workers.generate_service import GenerateLimits, GenerateService
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.selection import make_transport
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.handoff.wire import WireFormat
from antiphon.workers.handoff_metrics import HandoffCollector
from antiphon.workers.loading import Loaded, load
from antiphon.workers.peers import Peers
from antiphon.workers.prefill_client import PrefillClient
from antiphon.workers.prefill_ladder import LadderLimits
from antiphon.workers.prefill_service import PrefillService
from antiphon.workers.prewarm import LinkPrewarmer
from antiphon.workers.request_limits import RequestLimits
from antiphon.workers.request_trace import WorkerTracing
from antiphon.workers.scheduler import SchedulerConfig
from antiphon.workers.session import SessionServer
from antiphon.workers.session_key import new_session_key
from antiphon.workers.worker import Closer, Worker
from antiphon.workers.worker_metrics import WorkerMetrics
from antiphon.workers.worker_settings import WorkerSettings

logger = logging.getLogger(__name__)

# A step is the longest that a running stream stalls and that an abort waits: a second or less on
# one CPU core for a small model. A GPU needs more tokens to be busy.
_MAX_BATCH_TOKENS = {"cpu": 128, "cuda": 2048}


async def start_worker(settings: WorkerSettings) -> Worker:
    """Load the model and start serving sessions.

    Raises:
        ConfigError: Model or settings cannot be used; says what to change.
    """
    loaded = await asyncio.to_thread(load, settings)
    transport = make_transport(settings.handoff.transport, settings.host)
    await asyncio.to_thread(lambda: transport.address)  # torch looks up names: 9 s if none answers
    return await run_worker(settings, loaded, transport)


async def run_worker(settings: WorkerSettings, loaded: Loaded, transport: Transport) -> Worker:
    """Serve sessions with a loaded model."""
    metrics = WorkerMetrics(settings.role.value)
    session_key = new_session_key()
    server = SessionServer(
        metrics.render, session_key, metrics.session_refused, settings.silence_seconds
    )
    port = await server.listen(settings.host, settings.ports)
    card = _card(settings, loaded, port, session_key)
    worker = Worker(card, server, metrics)
    engine = Engine(
        loaded.runner,
        _scheduler_config(settings, loaded.runner.model.device),
        worker,
        settings.target_itl_seconds,
    )
    _register(metrics, settings, card, engine)
    endpoint = Endpoint(
        transport, loaded.runner.cache, card.incarnation, _wire_format(loaded), card.replica_id
    )
    limits = RequestLimits(card.max_context_tokens, loaded.runner.model.config.vocab_size)
    exporting = start_tracing(settings.tracing, card.role, card.replica_id, metrics)
    tracing = worker.tracing = WorkerTracing(exporting, card)
    sender, prefill = _prefill_service(worker, engine, endpoint, settings.handoff, limits)
    closers, generate = _generate_service(worker, engine, endpoint, settings, limits)
    metrics.registry.register(HandoffCollector(card.role, [sender, generate.receiver]))
    worker.run(engine, generate, prefill, [*closers, sender.close, tracing.close])
    kv_gib = card.num_blocks * card.block_size * card.kv_bytes_per_token / 2**30
    logger.info(
        "%s worker ready at %s: KV cache of %d blocks of %d tokens (%.2f GiB), context %d",
        card.role, card.url, card.num_blocks, card.block_size, kv_gib, card.max_context_tokens,
    )  # fmt: skip
    return worker


def _register(
    metrics: WorkerMetrics, settings: WorkerSettings, card: WorkerCard, engine: Engine
) -> None:
    """Let metrics say who this is, and how its engine does."""
    metrics.introduce(card, settings.model.name, __version__)
    metrics.registry.register(EngineCollector(card.role, engine))
    if settings.vllm_names and card.role is not Role.PREFILL:
        states = VllmCollector(settings.model.name, lambda: [worker_state(engine)])
        metrics.registry.register(states)


def _prefill_service(
    worker: Worker,
    engine: Engine,
    endpoint: Endpoint,
    handoff: HandoffConfig,
    limits: RequestLimits,
) -> tuple[HandoffSender, PrefillService]:
    service: PrefillService

    def on_done(transfer_id: str, error: Exception | None, size: int, seconds: float) -> None:
        service.on_transfer_ended(transfer_id, error, size, seconds)

    sender_limits = SenderLimits.of(handoff, endpoint.transport.place)
    sender = HandoffSender(endpoint, sender_limits, on_done)
    service = PrefillService(engine, sender, worker.metrics, limits, worker.tracing)
    return sender, service


def _generate_service(
    worker: Worker,
    engine: Engine,
    endpoint: Endpoint,
    settings: WorkerSettings,
    limits: RequestLimits,
) -> tuple[Sequence[Closer], GenerateService]:
    handoff = settings.handoff
    receiver_limits = ReceiverLimits.of(handoff, endpoint.transport.place)
    client: PrefillClient

    def on_done(transfer_id: str, num_tokens: int, error: Exception | None) -> None:
        client.on_transfer_ended(transfer_id, num_tokens, error)

    receiver = HandoffReceiver(endpoint, receiver_limits, on_done)
    peers = Peers(worker.card.incarnation, settings.silence_seconds)
    client = PrefillClient(receiver, peers, handoff.stall_seconds)
    generate_limits = GenerateLimits(
        request=limits,
        ladder=LadderLimits(handoff.max_prefill_attempts, handoff.timeout_seconds),
        max_fallback_tokens=handoff.max_fallback_tokens,
    )
    service = GenerateService(engine, client, worker.metrics, generate_limits, worker.tracing)
    worker.prewarmer = prewarmer = LinkPrewarmer(client)
    return [prewarmer.close, peers.close, receiver.close], service


def _card(settings: WorkerSettings, loaded: Loaded, port: int, session_key: str) -> WorkerCard:
    return WorkerCard(
        replica_id=settings.replica_id,
        incarnation=uuid.uuid4().hex,
        role=settings.role,
        url=f"ws://{settings.host}:{port}/session",
        model_fingerprint=loaded.fingerprint,
        block_size=loaded.runner.cache.block_size,
        num_blocks=loaded.runner.cache.num_blocks,
        max_context_tokens=loaded.max_context_tokens,
        kv_bytes_per_token=loaded.runner.cache.layout.num_bytes_per_token,
        wire_bytes_per_token=loaded.runner.cache.layout.num_wire_bytes_per_token,
        pid=os.getpid(),
        node=settings.host,
        session_key=session_key,
        start_seconds=time.monotonic() - settings.began_at,
        caches_prefixes=settings.engine.prefix_cache,
        max_waiting_requests=settings.engine.max_waiting_requests,
    )


def _wire_format(loaded: Loaded) -> WireFormat:
    layout = loaded.runner.cache.layout
    layers = tuple((x.num_kv_heads, x.k_head_dim, x.v_head_dim) for x in layout.layers)
    return WireFormat(loaded.fingerprint, layers, str(layout.wire_dtype).removeprefix("torch."))


def _scheduler_config(settings: WorkerSettings, device: torch.device) -> SchedulerConfig:
    engine = settings.engine
    return SchedulerConfig(
        max_batch_tokens=engine.max_batch_tokens or _MAX_BATCH_TOKENS[device.type],
        max_num_requests=engine.max_num_requests,
        max_waiting_requests=engine.max_waiting_requests,
        max_awaiting_kv=settings.handoff.max_pending,
        prefix_cache=engine.prefix_cache,
    )

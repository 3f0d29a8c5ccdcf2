"""Builds a worker from its configuration: model, cache, engine, links, session server."""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from antiphon import __version__
from antiphon.config import EngineConfig, HandoffConfig, ModelConfig, TracingConfig
from antiphon.errors import ConfigError
from antiphon.kernels.selection import select_kernels
from antiphon.messages import Role, WorkerCard
from antiphon.tracing import start_tracing
from antiphon.vllm_names import VllmCollector
from antiphon.workers.decode_graphs import capture_cuda_graph, graph_buckets
from antiphon.workers.engine import Engine
from antiphon.workers.engine_metrics import EngineCollector, worker_state
from antiphon.workers.generate_service import GenerateLimits, GenerateService
from antiphon.workers.handoff.endpoint import Endpoint
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.nccl import NcclTransport
from antiphon.workers.handoff.receiver import HandoffReceiver, ReceiverLimits
from antiphon.workers.handoff.sender import HandoffSender, SenderLimits
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.handoff.wire import WireFormat
from antiphon.workers.handoff_metrics import HandoffCollector
from antiphon.workers.kv_cache import KVCache, KVLayout
from antiphon.workers.memory_plan import num_kv_blocks
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.model_source import fingerprint
from antiphon.workers.paged_model import load_model
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

logger = logging.getLogger(__name__)

# A step is the longest that a running stream stalls and that an abort waits: a second or less on
# one CPU core for a small model. A GPU needs more tokens to be busy.
_MAX_BATCH_TOKENS = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What one worker needs to know to start."""

    role: Role
    replica_id: str
    host: str  # the address that other nodes reach this one at
    model_folder: Path
    model: ModelConfig
    engine: EngineConfig
    handoff: HandoffConfig
    target_itl_seconds: float | None = None  # of the router; prefill workers generate under one
    vllm_names: bool = False
    tracing: TracingConfig | None = None  # what is in force; no endpoint, no traces


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and what it may hold."""

    runner: ModelRunner
    fingerprint: str
    max_context_tokens: int


async def start_worker(settings: WorkerSettings) -> Worker:
    """Load the model and start serving sessions.

    Raises:
        ConfigError: Model or settings cannot be used; says what to change.
    """
    loaded = await asyncio.to_thread(load, settings)
    return await run_worker(settings, loaded, make_transport(settings))


def make_transport(settings: WorkerSettings) -> Transport:
    """What the configuration says carries KV.

    Raises:
        ConfigError: It can't work here.
    """
    if settings.handoff.transport == "nccl":
        return NcclTransport(settings.host)
    return GlooTransport(settings.host)


def load(settings: WorkerSettings) -> Loaded:
    """Load weights, check the family, and allocate the KV cache; takes seconds, blocks."""
    started_at = time.monotonic()
    engine = settings.engine
    torch.set_num_threads(engine.num_threads)
    device = torch.device(_device_name(engine))
    kernels = select_kernels(device, settings.role.value)
    model = load_model(settings.model_folder, _dtype(settings.model, device), device, kernels)
    limit = settings.model.max_context_tokens or model.max_context_tokens
    if limit > model.max_context_tokens:
        raise ConfigError(
            f"model.max_context_tokens: got {limit}; the model's own limit is "
            f"{model.max_context_tokens}"
        )
    layout = cache_layout(model.layout, engine, settings.handoff)
    num_blocks = num_kv_blocks(layout, engine, device, limit)
    # A request must always fit alone, or it could never finish.
    max_context_tokens = min(limit, num_blocks * engine.block_size)
    if max_context_tokens < limit:
        logger.warning(
            "context is %d of %d tokens: engine.kv_cache_bytes holds no more",
            max_context_tokens, limit,
        )  # fmt: skip
    cache = KVCache(layout, num_blocks, engine.block_size, device, kernels)
    runner = ModelRunner(model, cache)
    generates = settings.role is not Role.PREFILL or settings.target_itl_seconds is not None
    if kernels.captures_graphs and engine.cuda_graphs and generates:
        _capture_graphs(runner, engine)
    logger.info("loaded %s in %.1f s", settings.model_folder, time.monotonic() - started_at)
    return Loaded(runner, fingerprint(settings.model_folder), max_context_tokens)


def _capture_graphs(runner: ModelRunner, engine: EngineConfig) -> None:
    """Capture decode steps; a model that cannot be captured decodes eagerly, which is slower."""
    started_at = time.monotonic()
    buckets = graph_buckets(engine.max_num_requests)
    try:
        runner.capture_graphs(buckets, capture_cuda_graph)
    except RuntimeError as error:
        logger.warning(
            "decode steps of this model cannot be captured as CUDA graphs and run eagerly "
            "(antiphon_graph_steps_total stays 0): %s", error,
        )  # fmt: skip
    else:
        seconds = time.monotonic() - started_at
        logger.info("captured decode steps of %d batch sizes in %.1f s", len(buckets), seconds)


def cache_layout(layout: KVLayout, engine: EngineConfig, handoff: HandoffConfig) -> KVLayout:
    """The model's KV in the dtypes that are configured for the cache and the wire."""
    return replace(
        layout,
        dtype=_kv_dtype(engine.kv_cache_dtype, layout.dtype),
        wire_dtype=_kv_dtype(handoff.wire_dtype, layout.dtype),
    )


async def run_worker(settings: WorkerSettings, loaded: Loaded, transport: Transport) -> Worker:
    """Serve sessions with a loaded model."""
    metrics = WorkerMetrics(settings.role.value)
    session_key = new_session_key()
    server = SessionServer(metrics.render, session_key, metrics.session_refused)
    card = _card(settings, loaded, await server.listen(settings.host), session_key)
    worker = Worker(card, server, metrics)
    engine = Engine(
        loaded.runner,
        _scheduler_config(settings, loaded.runner.model.device),
        worker,
        settings.target_itl_seconds,
    )
    metrics.introduce(card, settings.model.name, __version__)
    metrics.registry.register(EngineCollector(card.role, engine))
    if settings.vllm_names and card.role is not Role.PREFILL:
        states = VllmCollector(settings.model.name, lambda: [worker_state(engine)])
        metrics.registry.register(states)
    endpoint = Endpoint(
        transport, loaded.runner.cache, card.incarnation, _wire_format(loaded), card.replica_id
    )
    limits = RequestLimits(card.max_context_tokens, loaded.runner.model.config.vocab_size)
    exporting = start_tracing(settings.tracing, card.role, card.replica_id, metrics)
    tracing = worker.tracing = WorkerTracing(exporting, card)
    sender, prefill = _prefill_service(engine, endpoint, settings.handoff, limits, tracing)
    closers, generate = _generate_service(worker, engine, endpoint, settings.handoff, limits)
    metrics.registry.register(HandoffCollector(card.role, [sender, generate.receiver]))
    worker.run(engine, generate, prefill, [*closers, sender.close, tracing.close])
    kv_gib = card.num_blocks * card.block_size * card.kv_bytes_per_token / 2**30
    logger.info(
        "%s worker ready at %s: KV cache of %d blocks of %d tokens (%.2f GiB), context %d",
        card.role, card.url, card.num_blocks, card.block_size, kv_gib, card.max_context_tokens,
    )  # fmt: skip
    return worker


def _prefill_service(
    engine: Engine,
    endpoint: Endpoint,
    handoff: HandoffConfig,
    limits: RequestLimits,
    tracing: WorkerTracing,
) -> tuple[HandoffSender, PrefillService]:
    service: PrefillService

    def on_done(transfer_id: str, error: Exception | None, size: int, seconds: float) -> None:
        service.on_transfer_ended(transfer_id, error, size, seconds)

    sender_limits = SenderLimits(max_links=handoff.max_links, piece_bytes=handoff.piece_bytes)
    sender = HandoffSender(endpoint, sender_limits, on_done)
    service = PrefillService(engine, sender, limits, tracing)
    return sender, service


def _generate_service(
    worker: Worker,
    engine: Engine,
    endpoint: Endpoint,
    handoff: HandoffConfig,
    limits: RequestLimits,
) -> tuple[Sequence[Closer], GenerateService]:
    receiver_limits = ReceiverLimits(
        timeout_seconds=handoff.timeout_seconds,
        max_links=handoff.max_links,
        max_pending=handoff.max_pending,
    )
    client: PrefillClient

    def on_done(transfer_id: str, num_tokens: int, error: Exception | None) -> None:
        client.on_transfer_ended(transfer_id, num_tokens, error)

    receiver = HandoffReceiver(endpoint, receiver_limits, on_done)
    peers = Peers(worker.card.incarnation)
    client = PrefillClient(receiver, peers, handoff.stall_seconds)
    generate_limits = GenerateLimits(
        request=limits,
        ladder=LadderLimits(handoff.max_prefill_attempts, handoff.timeout_seconds),
        max_fallback_tokens=handoff.max_fallback_tokens,
    )
    service = GenerateService(engine, client, worker.metrics, generate_limits, worker.tracing)
    worker.prewarmer = prewarmer = LinkPrewarmer(client, worker.metrics)
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


def _device_name(engine: EngineConfig) -> str:
    has_gpu = torch.cuda.is_available()
    if engine.device == "cuda" and not has_gpu:
        raise ConfigError("engine.device: got 'cuda', but this worker sees no GPU; set num_gpus: 1")
    return "cuda" if has_gpu and engine.device != "cpu" else "cpu"


def _kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return model_dtype
    dtype: torch.dtype = torch.float8_e4m3fn if name == "fp8" else getattr(torch, name)
    return dtype


def _dtype(model: ModelConfig, device: torch.device) -> torch.dtype | None:
    if model.dtype == "auto":
        # Without AVX-512 or AMX, half precision matrix products are ten times slower on a CPU.
        return torch.float32 if device.type == "cpu" else None
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype

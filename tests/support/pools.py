"""Real workers in one process, for tests of what happens between them."""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kv_contents import fill_with_garbage

from antiphon.config import EngineConfig, HandoffConfig, ModelConfig, TracingConfig
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.messages import (
    Abort,
    PrefillPeer,
    Refused,
    Role,
    SamplingParams,
    StepOutput,
    Submit,
    WorkerMessage,
)
from antiphon.workers.attention_interface import ATTENTION_NAME
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.transport import Transport
from antiphon.workers.kv_cache import KVCache
from antiphon.workers.loading import Loaded, cache_layout
from antiphon.workers.model_runner import ModelRunner
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.session import ClientSession
from antiphon.workers.start import run_worker
from antiphon.workers.worker import Worker
from antiphon.workers.worker_settings import WorkerSettings

WAIT_SECONDS = 60.0


async def start(
    role: Role,
    model: Any,
    *,
    engine: EngineConfig | None = None,
    handoff: HandoffConfig | None = None,
    num_blocks: int = 64,
    transport: Transport | None = None,
    vllm_names: bool = False,
    tracing: TracingConfig | None = None,
) -> Worker:
    """Start a worker over a model that may be shared with others."""
    engine = engine or EngineConfig()
    handoff = handoff or HandoffConfig(piece_bytes=0)  # tiny models' chunks are small
    paged = PagedModel(model, TorchKernels())
    model.set_attn_implementation(ATTENTION_NAME)
    layout = cache_layout(paged.layout, engine, handoff)
    cache = KVCache(layout, num_blocks, engine.block_size, paged.device, paged.kernels)
    fill_with_garbage(cache)
    settings = WorkerSettings(
        role=role,
        replica_id=f"{role}-{uuid.uuid4().hex[:6]}",
        host="127.0.0.1",
        model_folder=Path(),
        model=ModelConfig(),
        engine=engine,
        handoff=handoff,
        vllm_names=vllm_names,
        tracing=tracing,
    )
    limit = min(paged.max_context_tokens, num_blocks * engine.block_size)
    loaded = Loaded(ModelRunner(paged, cache), "tiny", limit)
    return await run_worker(settings, loaded, transport or GlooTransport("127.0.0.1"))


def peer_of(worker: Worker) -> PrefillPeer:
    """How a decode worker is told of a prefill worker."""
    return PrefillPeer.of(worker.card)


class Client:
    """An ingress's end of a session that keeps what it hears."""

    def __init__(self, session: ClientSession) -> None:
        self.session = session
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.ended: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self._changed = asyncio.Event()

    @classmethod
    async def connect(cls, worker: Worker) -> "Client":
        client = cls(await ClientSession.connect(worker.card.url, "test", worker.card.session_key))
        client.session.start(client._on_message, lambda: None)
        return client

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        prefill: PrefillPeer | Sequence[PrefillPeer] = (),
        eos: tuple[int, ...] = (),
    ) -> str:
        request_id = uuid.uuid4().hex
        sampling = SamplingParams(max_tokens, temperature=0, stop_token_ids=eos)
        candidates = (prefill,) if isinstance(prefill, PrefillPeer) else tuple(prefill)
        self.session.send(Submit(request_id, prompt, sampling, candidates))
        return request_id

    def abort(self, request_id: str) -> None:
        self.session.send(Abort(request_id))

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def finish(self, *request_ids: str) -> list[list[int]]:
        await self.wait_until(lambda: self.ended.keys() >= set(request_ids))
        return [self.tokens[request_id] for request_id in request_ids]

    def _on_message(self, message: WorkerMessage) -> None:
        if isinstance(message, StepOutput):
            for output in message.outputs:
                self.tokens[output.request_id] += output.token_ids
                if output.timing is not None:
                    self.paths[output.request_id] = output.timing.prefill_path
                if output.finish_reason is not None:
                    self.ended[output.request_id] = output.finish_reason
        elif isinstance(message, Refused):
            self.ended[message.request_id] = f"{message.kind}: {message.reason}"
        self._changed.set()


async def until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> float:
    """Poll a condition; return how long it took."""
    started = asyncio.get_running_loop().time()
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
    return asyncio.get_running_loop().time() - started


async def assert_idle(*workers: Worker) -> None:
    """Nothing is held any more: no block, job, transfer."""
    for worker in workers:
        await until(lambda w=worker: w.num_requests == 0)  # type: ignore[misc]
        await worker.check_idle()

"""What of a hand-off the first token waits for, with the real model on two real workers.

A prefill worker on core 1 and a decode worker on core 0 are started as the product starts them, but
without Ray; this process is their client. Exposed is what lies between the end of the prompt's last
step and the start of the first decode step: until all KV is in place (``RequestTiming.transfer``),
and what the decode worker's engine waited after that (``decode_queue``). The way of the message
that asked the prefill worker is in it, too, because no clock is shared that could tell it apart.
"""

import asyncio
import multiprocessing
import random
import statistics
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from handoff_link import HOST, SEED, use_core

from antiphon.config import DEFAULT_MODEL, EngineConfig, HandoffConfig, ModelConfig
from antiphon.messages import (
    PrefillPeer,
    Role,
    SamplingParams,
    StepOutput,
    Submit,
    WorkerCard,
    WorkerMessage,
)
from antiphon.request_timing import RequestTiming
from antiphon.workers.model_source import resolve_model
from antiphon.workers.session import ClientSession
from antiphon.workers.start import start_worker
from antiphon.workers.worker_settings import WorkerSettings

START_SECONDS = 300.0
REQUEST_SECONDS = 600.0
KV_CACHE_BYTES = 512 << 20


def run_worker_process(role: Role, core: int, folder: Path, pipe: Connection) -> None:
    """Serve until the pipe says something."""
    use_core(core)
    settings = WorkerSettings(
        role=role,
        replica_id=role.value,
        host=HOST,
        model_folder=folder,
        model=ModelConfig(),
        engine=EngineConfig(kv_cache_bytes=KV_CACHE_BYTES),
        handoff=HandoffConfig(timeout_seconds=REQUEST_SECONDS, stall_seconds=REQUEST_SECONDS),
    )

    async def serve() -> None:
        worker = await start_worker(settings)
        pipe.send(worker.card)
        await asyncio.to_thread(pipe.recv)
        await worker.close()

    asyncio.run(serve())


@dataclass(slots=True)
class Workers:
    """The client's view of the pair."""

    session: ClientSession
    prefill: WorkerCard
    first: asyncio.Queue[RequestTiming]

    async def request(self, num_tokens: int, rng: random.Random) -> tuple[float, float]:
        """TTFT as the decode worker measures it, and what of it was exposed transfer."""
        prompt = [rng.randrange(1000, 40_000) for _ in range(num_tokens)]
        peer = PrefillPeer.of(self.prefill)
        sampling = SamplingParams(max_tokens=1, temperature=0)
        self.session.send(Submit(uuid.uuid4().hex, prompt, sampling, (peer,)))
        timing = await asyncio.wait_for(self.first.get(), REQUEST_SECONDS)
        assert timing.prefill_path == "remote", timing
        return timing.total, timing.transfer + timing.decode_queue


@asynccontextmanager
async def workers() -> AsyncIterator[Workers]:
    """Start both workers and a session with the decode worker."""
    folder = resolve_model(DEFAULT_MODEL)
    context = multiprocessing.get_context("spawn")
    started = []
    for core, role in enumerate((Role.DECODE, Role.PREFILL)):
        here, there = context.Pipe()
        process = context.Process(
            target=run_worker_process, args=(role, core, folder, there), daemon=True
        )
        process.start()
        started.append((process, here))
    try:
        cards = []
        for _, here in started:
            assert await asyncio.to_thread(here.poll, START_SECONDS), "a worker did not start"
            cards.append(here.recv())
        yield await _connect(*cards)
    finally:
        for process, here in started:
            here.send("stop")
            await asyncio.to_thread(process.join, 30)
            process.kill()


async def _connect(decode: WorkerCard, prefill: WorkerCard) -> Workers:
    first: asyncio.Queue[RequestTiming] = asyncio.Queue()

    def on_message(message: WorkerMessage) -> None:
        assert isinstance(message, StepOutput), message
        for output in message.outputs:
            if output.timing is not None:
                first.put_nowait(output.timing)

    session = await ClientSession.connect(decode.url, "benchmark", decode.session_key)
    session.start(on_message, lambda: None)
    return Workers(session, prefill, first)


async def exposed(counts: dict[int, int]) -> dict[int, dict[str, float]]:
    """Median TTFT, exposed seconds and their ratio by prompt length, over so many requests each."""
    rng = random.Random(SEED)
    figures = {}
    async with workers() as pair:
        await pair.request(256, rng)  # makes the link
        for num_tokens, count in counts.items():
            rows = [await pair.request(num_tokens, rng) for _ in range(count)]
            figures[num_tokens] = {
                "ttft_seconds": statistics.median(row[0] for row in rows),
                "exposed_seconds": statistics.median(row[1] for row in rows),
                "exposed_ratio": statistics.median(row[1] / row[0] for row in rows),
            }
        await pair.session.close()
    return figures

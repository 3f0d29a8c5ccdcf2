"""A worker in a process of its own, on one core, that can change its role without a new model.

    python benchmarks/goodput_worker.py CORE MODEL_FOLDER

Reads one JSON object a line from stdin: role, max_batch_tokens, target_itl_seconds. Closes the
worker that runs, starts one like that, and answers with its card on stdout. Ends with stdin.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import msgspec

from antiphon.config import EngineConfig, HandoffConfig, ModelConfig
from antiphon.messages import Role
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.loading import load
from antiphon.workers.start import run_worker
from antiphon.workers.worker import Worker
from antiphon.workers.worker_settings import WorkerSettings

_HOST = "127.0.0.1"
_KV_CACHE_BYTES = 3 << 30  # room for every stream that the targets allow


async def main(core: int, folder: Path) -> None:
    """Serve until stdin ends."""
    os.sched_setaffinity(0, {core})
    engine = EngineConfig(kv_cache_bytes=_KV_CACHE_BYTES, max_num_requests=256)
    settings = WorkerSettings(
        role=Role.COLOCATED,
        replica_id=f"core-{core}",
        host=_HOST,
        model_folder=folder,
        model=ModelConfig(max_context_tokens=2048),
        engine=engine,
        handoff=HandoffConfig(max_pending=256),
    )
    loaded = await asyncio.to_thread(load, settings)
    worker: Worker | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        if worker is not None:
            await worker.close()
        wanted = json.loads(line)
        settings = replace(
            settings,
            role=Role(wanted["role"]),
            engine=engine.model_copy(update={"max_batch_tokens": wanted["max_batch_tokens"]}),
            target_itl_seconds=wanted["target_itl_seconds"],
        )
        worker = await run_worker(settings, loaded, GlooTransport(_HOST))
        print(msgspec.json.encode(worker.card).decode(), flush=True)
    if worker is not None:
        await worker.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))

"""Worker processes without Ray: a script that has imported everything, and forks for each worker.

It reads one JSON line per worker from its standard input: where to report, and pickled settings. A
forked worker connects to that Unix socket, says its card, and answers each line with its state, or
with the memory it uses if that is what the line asks for. It ends when the socket does, so nothing
outlives the test that started it.
"""

import asyncio
import base64
import json
import logging
import os
import pickle
import signal
import sys
import threading
from typing import Any

import msgspec
from live_bytes import live_bytes

from antiphon.workers.start import start_worker
from antiphon.workers.worker import Worker
from antiphon.workers.worker_settings import WorkerSettings


async def serve(report_to: str, settings: WorkerSettings) -> None:
    """Run one worker for as long as somebody listens."""
    worker = await start_worker(settings)
    reader, writer = await asyncio.open_unix_connection(report_to)
    writer.write(msgspec.json.encode(worker.card) + b"\n")
    while line := await reader.readline():
        answer = used_bytes(worker) if line == b"memory\n" else await describe(worker)
        writer.write(json.dumps(answer).encode() + b"\n")
    await worker.close()


async def describe(worker: Worker) -> dict[str, Any]:
    """What a worker holds and has counted; ``problem`` is empty if it is idle and sound."""
    problem = "" if worker.num_requests == 0 else f"{worker.num_requests} requests"
    if not problem:
        try:
            await worker.check_idle()
        except AssertionError as error:
            problem = str(error)
    totals: dict[str, float] = {}
    for family in worker.metrics.registry.collect():
        for sample in family.samples:
            labels = [value for key, value in sorted(sample.labels.items()) if key != "role"]
            totals["/".join([sample.name, *labels])] = sample.value
    return {
        "problem": problem,
        "num_tasks": len(asyncio.all_tasks()),
        "num_threads": threading.active_count(),
        "metrics": totals,
    }


def used_bytes(worker: Worker) -> int:
    """Memory in use, without the buffers of links, which come and go with their peers."""
    ends = (worker.generate.receiver, worker.prefill._sender)
    return live_bytes() - sum(end.counters().staging_bytes for end in ends)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the dead
    logging.basicConfig(level=logging.WARNING, format="%(process)d %(levelname)s %(message)s")
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin.close()
            settings = pickle.loads(base64.b64decode(order["settings"]))
            asyncio.run(serve(order["report_to"], settings))
            os._exit(0)


if __name__ == "__main__":
    main()

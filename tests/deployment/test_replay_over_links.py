"""What a client asked for survives its decode worker, whose successor gets the KV over a link."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from crew import watch
from memory_transport import MemoryNetwork, MemoryTransport
from pools import assert_idle, start, until
from tiny_models import tiny_model
from two_pools import backend_over, close, http_client

from antiphon.deployment.cluster_backend import ClusterBackend
from antiphon.messages import Role
from antiphon.workers.batch import Batch
from antiphon.workers.worker import Worker

STOPS_AT, KILLED_AT = 40, 15  # tokens of the first choice
BODY = {
    "model": "tiny",
    "prompt": [5 + i for i in range(40)],
    "max_tokens": 50,
    "n": 2,
    "temperature": 1.0,
    "top_p": 0.9,
    "seed": 7,
    "ignore_eos": True,
}


class Fate:
    """Holds the first decode worker that comes so far, until it is dead."""

    def __init__(self) -> None:
        self.victim: Worker | None = None
        self.is_dead = threading.Event()
        self._lock = threading.Lock()

    def awaits(self, worker: Worker) -> Callable[[Batch], None]:
        """For ``watch``."""
        num_steps = iter(range(1_000_000))

        def on_step(batch: Batch) -> None:
            if next(num_steps) == KILLED_AT:
                with self._lock:
                    is_first = self.victim is None
                    self.victim = self.victim or worker
                if is_first:
                    assert self.is_dead.wait(20)

        return on_step


def kill(backend: ClusterBackend, victim: Worker, heir: Worker) -> None:
    """Break every session of a worker, as the death of its process does."""
    for session in tuple(victim._server.sessions):
        session.cut()
    backend.set_workers(Role.DECODE, {heir.card.replica_id: heir.card})


def test_sampled_choices_and_their_stop_strings_survive_a_decode_worker() -> None:
    model, network, fate = tiny_model("llama"), MemoryNetwork(), Fate()

    def transport(name: str) -> MemoryTransport:
        return MemoryTransport(network, name)

    async def scenario() -> None:
        prefill = await start(Role.PREFILL, model, transport=transport("p"))
        pool = [await start(Role.DECODE, model, transport=transport(name)) for name in "de"]
        backend = await backend_over(prefill, *pool)
        async with http_client(backend) as http:

            async def ask(**more: Any) -> tuple[list[Any], int]:
                answer = (await http.post("/v1/completions", json=BODY | more)).json()
                return answer["choices"], answer["usage"]["completion_tokens"]

            text = (await ask())[0][0]["text"]
            stop = text[STOPS_AT : STOPS_AT + 3]
            assert text.find(stop) == STOPS_AT
            expected = await ask(stop=stop)
            assert expected[0][0]["finish_reason"] == "stop"
            for worker in pool:
                watch(worker, fate.awaits(worker))
            asking = asyncio.create_task(ask(stop=stop))
            await until(lambda: fate.victim is not None)
            (heir,) = [worker for worker in pool if worker is not fate.victim]
            assert fate.victim is not None
            num_before = heir.generate.receiver.counters().transfers
            kill(backend, fate.victim, heir)
            fate.is_dead.set()
            assert await asking == expected
            assert heir.generate.receiver.counters().transfers > num_before
            replays = backend._metrics.count(
                "antiphon_replays_total", reason="lost", outcome="resumed"
            )
            assert replays >= 1
        await assert_idle(prefill, heir)
        await close(backend, prefill, *pool)

    asyncio.run(asyncio.wait_for(scenario(), 60))

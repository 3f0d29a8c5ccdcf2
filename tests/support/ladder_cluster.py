"""Prefill workers that fail by plan, a decode worker that climbs the ladder, a client of it."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

from memory_transport import FaultPlan, MemoryNetwork, MemoryTransport
from pools import Client, assert_idle, peer_of, start
from tiny_models import VOCAB_SIZE

from antiphon.config import EngineConfig, HandoffConfig
from antiphon.messages import PrefillPeer, Role
from antiphon.workers.worker import Worker

MAX_TOKENS = 6
PROMPT = random.Random(1).choices(range(3, VOCAB_SIZE), k=60)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


class Cluster:
    """Prefill workers with a fault plan each, a decode worker, and a client of it."""

    def __init__(self, model: Any, *plans: FaultPlan, **handoff: Any) -> None:
        self._model = model
        self._plans = plans
        self._handoff = HandoffConfig(**handoff)
        self.prefills: list[Worker] = []

    async def __aenter__(self) -> "Cluster":
        network = self.network = MemoryNetwork()
        for index, plan in enumerate(self._plans):
            transport = MemoryTransport(network, f"p{index}", plan)
            engine = EngineConfig(max_batch_tokens=16)
            self.prefills.append(
                await start(Role.PREFILL, self._model, engine=engine, transport=transport)
            )
        self.decode = await start(
            Role.DECODE,
            self._model,
            handoff=self._handoff,
            engine=EngineConfig(max_batch_tokens=16),
            transport=MemoryTransport(network, "d"),
        )
        self.client = await Client.connect(self.decode)
        return self

    async def __aexit__(self, *failure: object) -> None:
        for plan in self._plans:
            plan.release()
        if failure[0] is None:
            await assert_idle(self.decode, *self.prefills)
            assert self.decode.generate.receiver.num_pending == 0
            assert not self.decode.generate._ladder._climbs
        for closing in (self.client.session, self.decode, *self.prefills):
            await closing.close()

    @property
    def candidates(self) -> list[PrefillPeer]:
        return [peer_of(worker) for worker in self.prefills]

    def submit(self, *candidates: PrefillPeer, prompt: list[int] = PROMPT) -> str:
        return self.client.submit(prompt, MAX_TOKENS, candidates or self.candidates)

    def attempts(self, outcome: str) -> float:
        return self.decode.metrics.count("antiphon_prefill_attempts_total", outcome=outcome)

    def fallbacks(self, reason: str) -> float:
        return self.decode.metrics.count("antiphon_prefill_fallbacks_total", reason=reason)

    def computed(self) -> list[int]:
        """Prompt tokens that each prefill worker computed."""
        return [worker.engine.stats.num_prompt_tokens for worker in self.prefills]

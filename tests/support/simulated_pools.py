"""Two workers and a router in virtual time: the real policy, telemetry view, engine and scheduler.

Only the forward pass is missing: a step takes what ``virtual_time`` says, with some noise.
So a minute of load takes a second and always ends the same.

    arrival -> choose -> engine of the chosen worker -> steps -> first token, ..., last token
                            | remote: reserved              ^
                            +-> engine of the prefill worker -> KV arrives
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from virtual_time import Clock, Served, Step, Traffic, step_seconds

from antiphon.block_hash import BlockHash
from antiphon.config import RouterConfig
from antiphon.messages import Load, RequestOutput, Role, SamplingParams, Telemetry, WorkerCard
from antiphon.router.decision import Reason
from antiphon.router.policy import Policy
from antiphon.router.telemetry_view import ClusterView
from antiphon.workers import engine as engine_module
from antiphon.workers.batch import Batch
from antiphon.workers.engine import Engine
from antiphon.workers.request import PrefillPath, Request, RequestStatus
from antiphon.workers.scheduler import SchedulerConfig
from antiphon.workers.telemetry import PUBLISH_INTERVAL_SECONDS

_MESSAGE_SECONDS = 0.003
_HANDOFF_SECONDS = 0.008
_NOISE = 0.08
_SLOW_STEPS = 0.004  # share of steps that take several times as long


class SimulatedWorker:
    """An engine whose thread never runs: its steps are events. Also its listener and runner."""

    num_graph_steps = 0

    def __init__(self, pools: "SimulatedPools", role: Role, index: int, target: float | None):
        self.pools = pools
        self.cache = SimpleNamespace(num_blocks=4000, block_size=16)
        name = f"worker-{index}"
        self.card = WorkerCard(
            name, name, role, f"ws://{name}", "model", 16, 4000, 8192, 46_080, 46_080, 1, "node"
        )
        runner: Any = self
        config = SchedulerConfig(pools.max_batch_tokens, 256, 256, 256)
        self.engine = Engine(runner, config, self, target)
        self.load: Load = self.engine.load(self.engine._scheduler)
        self.steps: list[Step] = []
        self._sequence = 0
        self._is_busy = self._will_publish = False
        pools.view.join(self.card)
        pools.view.apply(name, Telemetry(0, True, [], [], self.load), 0.0)

    def submit(self, request: Request) -> None:
        self.engine.add(request)
        self.wake()

    def wake(self) -> None:
        if not self._is_busy:
            self._begin_step()

    def run(self, batch: Batch, is_abandoned: Callable[[], bool]) -> list[int]:
        self.pools.clock.now += self.steps[-1].seconds
        return [1] * sum(chunk.samples for chunk in batch.chunks)

    def settle(self) -> None:
        """A step is over when its time is."""

    def _begin_step(self) -> None:
        engine, clock = self.engine, self.pools.clock
        engine._apply_commands(wait=False)
        batch = engine._schedule()
        stored, removed = engine._scheduler.pool.drain_changes()
        self.on_changed(stored, removed, engine.load(engine._scheduler))
        self._is_busy = batch is not None
        if batch is None:
            return
        num_streams = sum(chunk.samples and chunk.num_tokens == 1 for chunk in batch.chunks)
        num_prompt = sum(chunk.num_tokens for chunk in batch.chunks) - num_streams
        seconds = step_seconds(num_streams, num_prompt) * self.pools.noise()
        self.steps.append(Step(clock.now, num_streams, num_prompt, seconds))

        def end() -> None:
            clock.now -= seconds  # ``run`` takes it there again
            engine._step(batch)
            self._begin_step()

        clock.at(clock.now + seconds, end)

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.pools.later(_MESSAGE_SECONDS, lambda output=output: self.pools.receive(output))

    def on_reserved(self, request: Request) -> None:
        prefill = self.pools.prefill_worker_of(request.request_id)
        wanted = Request(f"kv-{request.request_id}", request.prompt_token_ids[:-1], sampling=None)
        self.pools.later(_MESSAGE_SECONDS, lambda: prefill.submit(wanted))

    def on_prompt_progress(self, request: Request) -> None:
        if request.status is RequestStatus.SENDING:
            self.pools.later(_HANDOFF_SECONDS, lambda: self._hand_over(request))

    def on_refused(self, request_id: str, error: Exception) -> None:
        raise error

    def on_changed(self, stored: list[BlockHash], removed: list[BlockHash], load: Load) -> None:
        if load != self.load and not self._will_publish:
            self._will_publish = True
            self.pools.later(PUBLISH_INTERVAL_SECONDS, self._publish)
        self.load = load

    def _publish(self) -> None:
        self._will_publish = False
        self._sequence += 1
        message = Telemetry(self._sequence, False, [], [], self.load)
        self.pools.view.apply(self.card.incarnation, message, self.pools.clock.now)

    def _hand_over(self, request: Request) -> None:
        request_id = request.request_id.removeprefix("kv-")
        decode = self.pools.decode_worker_of(request_id)
        now = self.pools.clock.now
        decode.engine.call(
            lambda scheduler: scheduler.kv_arrived(
                request_id, request.num_tokens, PrefillPath.REMOTE, now
            )
        )
        decode.wake()
        self.engine.abort(request.request_id)
        self.wake()


@dataclass(slots=True)
class SimulatedPools:
    """Workers of these roles; they and the router know the targets if ``keeps_targets``.

    Construct only with ``engine_module.time`` patched: see ``serve``.
    """

    roles: tuple[Role, ...]
    ttft_seconds: float
    itl_seconds: float
    clock: Clock
    rng: random.Random
    max_batch_tokens: int = 128
    keeps_targets: bool = True
    view: ClusterView = field(default_factory=ClusterView)
    workers: dict[str, SimulatedWorker] = field(default_factory=dict)
    served: dict[str, Served] = field(default_factory=dict)
    num_sent: int = 0
    policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        ttft, itl = self.ttft_seconds, self.itl_seconds
        if not self.keeps_targets:
            ttft = itl = None
        self.policy = Policy(RouterConfig(target_ttft_seconds=ttft, target_itl_seconds=itl))
        for index, role in enumerate(self.roles):
            worker = SimulatedWorker(self, role, index, itl)
            self.workers[worker.card.incarnation] = worker

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        self.clock.at(self.clock.now + seconds, event)

    def noise(self) -> float:
        slow = self.rng.uniform(2, 6) if self.rng.random() < _SLOW_STEPS else 1.0
        return slow * self.rng.lognormvariate(0, _NOISE)

    def submit(self, num_prompt_tokens: int, served: Served) -> None:
        """Decide on a request now and send it; no two prompts share a prefix."""
        self.num_sent += 1
        request_id = f"r{self.num_sent}"
        first = 10_000 * self.num_sent
        prompt = list(range(first, first + num_prompt_tokens))
        decision = self.policy.choose(self.view, self.view.hash_prompt(prompt), self.clock.now)
        self.policy.on_sent(self.view, decision)
        served.decision = decision
        self.served[request_id] = served
        sampling = SamplingParams(served.num_output_tokens, temperature=0)
        path = PrefillPath.REMOTE if decision.prefill else PrefillPath.LOCAL
        request = Request(request_id, prompt, sampling, path)
        worker = self.workers[decision.decode.incarnation]
        self.later(_MESSAGE_SECONDS, lambda: worker.submit(request))

    def receive(self, output: RequestOutput) -> None:
        served = self.served[output.request_id]
        assert served.decision is not None
        if not served.num_tokens:
            served.first_at = self.clock.now
            self.policy.on_first_token(served.decision)
        served.last_at = self.clock.now
        served.num_tokens += len(output.token_ids)
        if output.finish_reason:
            self.policy.on_finished(served.decision)

    def prefill_worker_of(self, request_id: str) -> SimulatedWorker:
        decision = self.served[request_id].decision
        assert decision is not None
        assert decision.prefill is not None
        return self.workers[decision.prefill.incarnation]

    def decode_worker_of(self, request_id: str) -> SimulatedWorker:
        decision = self.served[request_id].decision
        assert decision is not None
        return self.workers[decision.decode.incarnation]

    def reasons(self) -> list[Reason]:
        return [served.decision.reason for served in self.served.values() if served.decision]


def serve(
    roles: tuple[Role, ...], targets: tuple[float, float], traffic: Traffic, **settings: Any
) -> SimulatedPools:
    """Serve all of a traffic, after some requests by which workers learn what steps take.

    ``settings`` are fields of ``SimulatedPools`` with a default.
    """
    clock = Clock()
    with patch.object(engine_module, "time", clock):
        pools = SimulatedPools(roles, *targets, clock, random.Random(traffic.seed), **settings)
        _serve(pools, traffic)
    return pools


def _serve(pools: SimulatedPools, traffic: Traffic) -> None:
    clock = pools.clock
    for num_prompt_tokens in (130, 260, 130, 260, 100, 100):
        pools.submit(num_prompt_tokens, Served(clock.now, 12))
        clock.run()
    pools.served.clear()
    due_at = clock.now
    for gap, num_prompt_tokens, num_output_tokens in traffic.requests():
        due_at += gap
        served = Served(due_at, num_output_tokens)
        clock.at(due_at, lambda p=num_prompt_tokens, s=served: pools.submit(p, s))
    clock.run()
    assert all(served.is_complete for served in pools.served.values())

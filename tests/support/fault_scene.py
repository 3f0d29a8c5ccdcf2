"""Plays one cell of the fault table: sends a request, strikes at its step, looks what came."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from crew import CHUNK_TOKENS, Crew, Setting, assert_no_handoffs, by_label
from fault_cells import Cell, Kind, Party, Step
from faulty_transport import FaultyLink, Message, Send
from pools import assert_idle
from torch import Tensor

from antiphon.config import HandoffConfig
from antiphon.errors import AntiphonError
from antiphon.messages import Role, SamplingParams
from antiphon.workers.batch import Batch
from antiphon.workers.worker import Worker

ANSWER_SECONDS = 20.0  # within which every client has an answer or an error
DELAY_SECONDS = 0.1
SILENCE_SECONDS = 0.4  # after which decode gives a prefill worker up, in cells that are about that
SLOW_READ_SECONDS = 0.02
PROMPT = [5 + i for i in range(2 * CHUNK_TOKENS + 13)]
OTHER_PROMPT = [100 - i for i in range(2 * CHUNK_TOKENS + 13)]
MAX_TOKENS = 8
WITH_SPARES = Setting()


class Answer:
    """What the client got."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.path = ""
        self.error: AntiphonError | None = None


class Scene:
    """One cell being played. ``strike`` and the hooks run on whatever thread reaches the step."""

    def __init__(self, cell: Cell, model: Any, setting: Setting = WITH_SPARES) -> None:
        self.cell = cell
        self.crew = Crew(model, _handoff_config(cell), setting)
        self.struck = threading.Event()
        self.errors: list[Exception] = []
        self.num_warm_up = 0  # prompts before the one that meets the fault
        self._is_armed = False  # links are made before the request, and nothing may strike then
        self._released = threading.Event()
        self._num_segments = 0  # sent
        self._num_steps = 0  # of the prefill worker
        self._is_black_hole = False
        self._held: Message | None = None
        self._impeded: list[FaultyLink] = []  # whose reader hangs or is slow

    async def play(self) -> tuple[Answer, Answer]:
        """Return what the client got, and what another one got after the fault."""
        self._loop = asyncio.get_running_loop()
        on_steps = [self._on_prefill_step, self._on_decode_step]
        await self.crew.start(self._on_send, self._on_received, on_steps)
        try:
            await self._prepare()
            answer = await self._ask(PROMPT)
        finally:
            self._released.set()
            for proxy in self.crew.proxies:
                proxy.release()
        assert self.struck.is_set(), "the fault never struck"
        assert self.errors == []
        return answer, await self._ask(OTHER_PROMPT)

    async def check_and_close(self) -> None:
        """Nothing may be held by anybody who lives, and nothing at all once all have ended."""
        await assert_idle(*self.crew.alive)
        await assert_no_handoffs(self.crew.alive)
        await self.crew.close()
        for worker in self.crew.workers:
            for end in (worker.generate.receiver, worker.prefill._sender):
                assert (end.num_links, end.counters().staging_bytes) == (0, 0)

    @property
    def attempts(self) -> Counter[str]:
        """Prompts that living decode workers have asked others for, by how that ended."""
        return self._decoding("antiphon_prefill_attempts_total", "outcome")

    @property
    def fallbacks(self) -> Counter[str]:
        """Prompts that living workers have computed in their stead, by why."""
        return self._decoding("antiphon_prefill_fallbacks_total", "reason")

    @property
    def num_replays(self) -> float:
        """Requests that the ingress has counted as gone on at another worker."""
        resumed = {"reason": "lost", "outcome": "resumed"}
        return self.crew.metrics.count("antiphon_replays_total", **resumed)

    def _decoding(self, name: str, label: str) -> Counter[str]:
        counts: Counter[str] = Counter()
        for worker in self.crew.alive:
            counts.update(by_label(worker.metrics, name, label))
        return +counts

    async def _prepare(self) -> None:
        await self.crew.wait_prewarmed()
        if self.cell.step is Step.HANDSHAKE:
            await self.crew.unmake_links()
        self._is_armed = True
        at_ask = self.cell.step is Step.ASK
        if at_ask and self.cell.party is Party.LINK and self.cell.kind is not Kind.KILL:
            self.struck.set()  # the session must be there before it can fall silent
            self.num_warm_up += 1
            await self._ask(OTHER_PROMPT[::-1])
            self._strike()
        elif at_ask and self.cell.party is Party.DECODE:
            self.crew.decode.engine.call(lambda _: self._on_decode_asked())

    async def _ask(self, prompt: list[int]) -> Answer:
        answer = Answer()
        sampling = SamplingParams(MAX_TOKENS, temperature=0)
        async with asyncio.timeout(ANSWER_SECONDS):
            try:
                async for output in self.crew.backend.generate("request", prompt, sampling):
                    answer.tokens += output.token_ids
                    if output.timing is not None:
                        answer.path = output.timing.prefill_path
            except AntiphonError as error:
                answer.error = error
        return answer

    # Where a request is, as seen from the threads that move it on.

    def _on_prefill_step(self, batch: Batch) -> None:
        self._reach(Step.ASK, Party.PREFILL, Party.LINK)
        self._num_steps += 1
        # Each chunk is a segment of its own, or there would be no middle one to hit.
        _wait(lambda: self._num_segments >= self._num_steps - 1 or self.struck.is_set())

    def _on_decode_asked(self) -> None:
        _wait(lambda: self.crew.decode.num_requests == 1)
        self._reach(Step.ASK, Party.DECODE)

    def _on_decode_step(self, batch: Batch) -> None:
        if any(chunk.request.output_token_ids for chunk in batch.chunks):
            self._reach(Step.DECODE, *Party)

    def _on_send(self, step: Step, link: FaultyLink, message: Message, send: Send) -> None:
        cell = self.cell
        if cell.kind is Kind.REORDER and self._is_armed and not self.struck.is_set():
            self._reorder(step, message, send)
        elif cell.party is not Party.LINK or not self._is_struck_by(step):
            self._reach(step, Party.PREFILL, Party.DECODE)
            if not self._is_black_hole:
                send(message)
        else:
            self._damage(link, message, send)
        self._num_segments += step in (Step.FIRST, Step.MIDDLE)

    def _on_received(self, link: FaultyLink) -> None:
        if link in self._impeded:
            self._released.wait(
                SLOW_READ_SECONDS if self.cell.kind is Kind.SLOW_READER else ANSWER_SECONDS
            )

    # The faults.

    def _is_struck_by(self, step: Step) -> bool:
        if step is not self.cell.step or self.struck.is_set() or not self._is_armed:
            return False
        self.struck.set()
        return True

    def _reach(self, step: Step, *parties: Party) -> None:
        if self.cell.party in parties and self._is_struck_by(step):
            self._strike()

    def _strike(self) -> None:
        """Do what is not done to a single message."""
        try:
            self._do()
        except Exception as error:  # the thread that got here may have caught it
            self.errors.append(error)
            raise

    def _do(self) -> None:
        cell = self.cell
        if cell.party is Party.LINK:
            self._strike_session(self.crew.proxies[cell.step is Step.DECODE])
        elif cell.kind is Kind.KILL:
            self._kill(self.crew.prefill if cell.party is Party.PREFILL else self.crew.decode)
        elif cell.party is Party.DECODE and cell.step not in (Step.ASK, Step.DECODE):
            self._impede_reader()
        else:
            self._hang()

    def _hang(self) -> None:
        """Block the thread that got here, if it is the party's own, and its engine."""
        cell = self.cell
        seconds = DELAY_SECONDS if cell.kind is Kind.DELAY else ANSWER_SECONDS
        if cell.party is Party.DECODE:  # nobody else can go on with the request
            seconds = min(seconds, SILENCE_SECONDS)
        elif cell.step is not Step.ASK:
            self.crew.prefill.engine.call(lambda _: self._released.wait(seconds))
        if cell.party is Party.DECODE or cell.step is not Step.DECODE:
            self._released.wait(seconds)

    def _impede_reader(self) -> None:
        link_ids = {link.link_id for link in self.crew.transports[Role.PREFILL].links}
        ends = self.crew.transports[Role.DECODE].links
        self._impeded = [link for link in ends if link.link_id in link_ids]
        if self.cell.kind is Kind.DELAY:
            self._loop.call_soon_threadsafe(
                self._loop.call_later, DELAY_SECONDS, self._released.set
            )

    def _kill(self, worker: Worker) -> None:
        self.crew.transports[worker.card.role].sever()  # before anything can be said over them
        # The dead take no step more, and do not fall back.
        worker.engine.call(lambda _: self._released.wait(ANSWER_SECONDS))
        asyncio.run_coroutine_threadsafe(self.crew.kill(worker), self._loop).result(ANSWER_SECONDS)

    def _strike_session(self, proxy: Any) -> None:
        def act() -> None:
            if self.cell.kind is Kind.KILL:
                proxy.cut()
                return
            proxy.hold()
            if self.cell.kind is Kind.DELAY:
                self._loop.call_later(DELAY_SECONDS, proxy.release)

        self._loop.call_soon_threadsafe(act)

    def _damage(self, link: FaultyLink, message: Message, send: Send) -> None:
        """Do to the message that is about to go what the cell says."""
        match self.cell.kind:
            case Kind.KILL:
                link.close()
                send(message)
            case Kind.HANG:
                self._is_black_hole = True  # it, and whatever follows it, is lost in silence
            case Kind.DELAY:
                time.sleep(DELAY_SECONDS)
                send(message)
            case Kind.DUPLICATE:
                send(message)
                send(message)
            case Kind.CORRUPT_HEADER:
                send([_flipped(message[0], 17), *message[1:]])
            case Kind.CORRUPT_PAYLOAD:
                send([*message[:-1], _flipped(message[-1], -1)])

    def _reorder(self, step: Step, message: Message, send: Send) -> None:
        """Let a segment overtake the one before it; END overtakes the last."""
        held, self._held = self._held, None
        if step is Step.HANDSHAKE:
            send(message)
            return
        overtakes = {
            Step.FIRST: held is not None,
            Step.MIDDLE: self._num_segments == 2,
            Step.END: step is Step.END,
        }[self.cell.step]
        if overtakes:
            self.struck.set()
            send(message)
        if held is not None:
            send(held)
        if not overtakes:
            self._held = [tensor.clone() for tensor in message]


def _flipped(tensor: Tensor, place: int) -> Tensor:
    """A copy with a wrong bit: at place 17 in any header, at -1 in any payload."""
    damaged = tensor.clone()
    damaged[place] ^= 0x10
    return damaged


def _handoff_config(cell: Cell) -> HandoffConfig:
    return HandoffConfig(
        stall_seconds=SILENCE_SECONDS if cell.times_out else ANSWER_SECONDS,
        piece_bytes=0,  # of a tiny model all is less than any piece
    )


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "a step was never reached"
        time.sleep(0.001)

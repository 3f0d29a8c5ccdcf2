"""The decode side: owns a request from submission to its last token.

    Submit -> queue -> reserve blocks --local----------------------------> running -> StepOutput*
                           |                                                  ^
                           +--remote--> ask a prefill worker, expect its KV --+ all arrived
                                              |                               |
                                              +-- refused, lost, slow --------+ fallback: compute
                                                                                here what is missing

A fallback is counted and logged with its reason. The receiver's fence makes it safe: once a
transfer is cancelled nothing writes to its blocks, so they can be computed into.
"""

import asyncio
import contextlib
import logging
import uuid
from dataclasses import dataclass, field

from antiphon.errors import (
    AntiphonError,
    CapacityError,
    LinkBrokenError,
    WorkerBusyError,
)
from antiphon.messages import (
    Abort,
    Prefill,
    PrefillDone,
    Refused,
    RequestOutput,
    StepOutput,
    Submit,
    WorkerMessage,
)
from antiphon.metrics import Metrics
from antiphon.workers.block_pool import BlockId
from antiphon.workers.engine import Engine
from antiphon.workers.handoff.receiver import HandoffReceiver
from antiphon.workers.peers import Peers
from antiphon.workers.request import PrefillPath, Request
from antiphon.workers.request_limits import RequestLimits
from antiphon.workers.session import ClientSession, Session

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    session: Session
    message: Submit
    transfer_id: str = ""
    peer: ClientSession | None = None
    first_token: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class GenerateService:
    """Answers ``Submit`` messages. All methods run on the event loop unless they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        receiver: HandoffReceiver,
        peers: Peers,
        metrics: Metrics,
        limits: RequestLimits,
    ) -> None:
        self._engine = engine
        self.receiver = receiver
        self._peers = peers
        self._metrics = metrics
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[str, _Job] = {}
        self._by_transfer: dict[str, _Job] = {}

    @property
    def num_jobs(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def start(self, session: Session, message: Submit) -> None:
        """Queue a request, or refuse it."""
        problem = self._problem(message)
        if problem:
            session.send(Refused(message.request_id, "invalid", problem))
            return
        self._jobs[message.request_id] = _Job(session, message)
        session.request_ids.add(message.request_id)
        path = PrefillPath.REMOTE if message.prefill is not None else PrefillPath.LOCAL
        request = Request(message.request_id, message.prompt_token_ids, message.sampling, path)
        self._engine.add(request)

    def abort(self, request_id: str, outcome: str = "aborted") -> None:
        """Stop a request here and on the prefill worker."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        self._drop_transfer(job)
        self._engine.abort(request_id)
        self._end(request_id, outcome)

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        """Tokens of a step, handed to the sessions that asked for them."""
        by_session: dict[Session, list[RequestOutput]] = {}
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue  # aborted since
            by_session.setdefault(job.session, []).append(output)
            if output.finish_reason is not None:
                self._end(output.request_id, output.finish_reason)
        for session, session_outputs in by_session.items():
            session.send(StepOutput(session_outputs))

    def on_refused(self, request_id: str, error: Exception) -> None:
        """The engine could not take a request, or its step failed."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        is_busy = isinstance(error, CapacityError)
        if is_busy:
            self._metrics.refused("queue_full")
        job.session.send(Refused(request_id, "busy" if is_busy else "failed", str(error)))
        self._end(request_id, "refused" if is_busy else "failed")

    def on_reserved(self, request_id: str, block_table: list[BlockId], first_token: int) -> None:
        """Blocks are reserved: ask the prefill worker for what they lack."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        job.first_token = first_token
        task = asyncio.create_task(self._ask(job, block_table))
        job.tasks.add(task)
        task.add_done_callback(job.tasks.discard)

    def on_transfer_ended(self, transfer_id: str, num_tokens: int, error: Exception | None) -> None:
        """A transfer is complete or failed after ``num_tokens`` of it; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed at interpreter exit
            self._loop.call_soon_threadsafe(self._transfer_ended, transfer_id, num_tokens, error)

    async def _ask(self, job: _Job, block_table: list[BlockId]) -> None:
        message = job.message
        assert message.prefill is not None
        try:
            peer = await self._peers.get(message.prefill, self._on_peer_message, self._on_peer_lost)
            if message.request_id not in self._jobs:
                return  # aborted while connecting
            self._expect_and_ask(job, peer, block_table)
        except AntiphonError as error:
            self._fall_back(job, job.first_token, error)
        except Exception as error:  # whatever it is, the request must not wait for ever
            logger.exception("request %s: asking the prefill worker failed", message.request_id)
            self._fall_back(job, job.first_token, error)

    def _expect_and_ask(self, job: _Job, peer: ClientSession, block_table: list[BlockId]) -> None:
        if peer.is_closed:  # whoever was told of that did not know of this request yet
            raise LinkBrokenError("the prefill worker is gone")
        message = job.message
        prompt = message.prompt_token_ids[:-1]  # the last token is an ordinary decode step
        job.peer = peer
        job.transfer_id = uuid.uuid4().hex
        link = self.receiver.offer(peer.card.incarnation)
        self.receiver.expect(
            job.transfer_id, link.link_id, block_table, job.first_token, len(prompt)
        )
        self._by_transfer[job.transfer_id] = job
        peer.send(Prefill(job.transfer_id, job.transfer_id, prompt, job.first_token, link))

    def _on_peer_message(self, message: WorkerMessage) -> None:
        if isinstance(message, Refused):
            job = self._by_transfer.get(message.request_id)
            if job is not None:
                self._cancel_and_fall_back(job, _refusal(message))
        elif not isinstance(message, PrefillDone):
            logger.warning("unexpected %s from a prefill worker", type(message).__name__)

    def _on_peer_lost(self, peer: ClientSession) -> None:
        for job in [job for job in self._by_transfer.values() if job.peer is peer]:
            self._cancel_and_fall_back(job, LinkBrokenError("the prefill worker is gone"))

    def _cancel_and_fall_back(self, job: _Job, error: AntiphonError) -> None:
        if self.receiver.cancel(job.transfer_id):  # else its end is on its way here
            self._by_transfer.pop(job.transfer_id, None)
            self._fall_back(job, job.first_token, error)

    def _transfer_ended(self, transfer_id: str, num_tokens: int, error: Exception | None) -> None:
        job = self._by_transfer.pop(transfer_id, None)
        if job is None:
            return  # aborted or fallen back since
        num_in_place = job.first_token + num_tokens
        if error is None:
            self._engine.kv_arrived(job.message.request_id, num_in_place, PrefillPath.REMOTE)
            return
        if job.peer is not None:
            job.peer.send(Abort(transfer_id))
        self._fall_back(job, num_in_place, error)

    def _fall_back(self, job: _Job, num_tokens: int, error: Exception) -> None:
        """Compute here what did not arrive: all beyond the prompt's first ``num_tokens``."""
        request_id = job.message.request_id
        self._metrics.fell_back(type(error).__name__)
        missing = len(job.message.prompt_token_ids) - num_tokens
        logger.warning("request %s: computing %d tokens here: %s", request_id, missing, error)
        self._engine.kv_arrived(request_id, num_tokens, PrefillPath.FALLBACK)

    def _drop_transfer(self, job: _Job) -> None:
        for task in tuple(job.tasks):
            task.cancel()
        if self._by_transfer.pop(job.transfer_id, None) is not None:
            self.receiver.cancel(job.transfer_id)
            if job.peer is not None:
                job.peer.send(Abort(job.transfer_id))

    def _end(self, request_id: str, outcome: str) -> None:
        job = self._jobs.pop(request_id)
        job.session.request_ids.discard(request_id)
        self._metrics.request_ended(outcome)

    def _problem(self, message: Submit) -> str | None:
        if message.request_id in self._jobs:
            return "request_id: already in use on this worker"
        return self._limits.explain_generation(message.prompt_token_ids, message.sampling)


def _refusal(message: Refused) -> AntiphonError:
    reason = f"the prefill worker {message.kind}: {message.reason}"
    return WorkerBusyError(reason) if message.kind == "busy" else LinkBrokenError(reason)

"""An ingress's session with one worker: requests go out, outputs come back by request.

    connecting --welcome--> open --lost--> closed      (whoever holds it makes a new one)

When the session is lost, every request on it ends with WorkerLostError at once.
"""

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, Callable

from antiphon.errors import (
    AntiphonError,
    RequestError,
    WorkerBusyError,
    WorkerDrainingError,
    WorkerLostError,
    WorkerMovedError,
)
from antiphon.messages import (
    Abort,
    PrefillPool,
    RefusalKind,
    Refused,
    RequestOutput,
    StepOutput,
    Submit,
    Telemetry,
    WorkerCard,
    WorkerMessage,
)
from antiphon.workers.session import SILENCE_SECONDS, ClientSession

logger = logging.getLogger(__name__)

_Item = RequestOutput | AntiphonError


class WorkerConnection:
    """One open session; everything runs on the event loop that opened it."""

    def __init__(self, session: ClientSession) -> None:
        self.card: WorkerCard = session.card
        self._session = session
        self._queues: dict[str, asyncio.Queue[_Item]] = {}

    @classmethod
    async def open(
        cls,
        card: WorkerCard,
        client_id: str,
        on_telemetry: Callable[[Telemetry], None],
        on_lost: Callable[[], None],
        silence_seconds: float = SILENCE_SECONDS,
    ) -> "WorkerConnection":
        """Connect and subscribe.

        Raises:
            LinkBrokenError: The worker cannot be reached.
            WorkerLostError: Another incarnation lives there now.
        """
        session = await ClientSession.connect(
            card.url,
            client_id,
            card.session_key,
            wants_telemetry=True,
            silence_seconds=silence_seconds,
        )
        if session.card.incarnation != card.incarnation:
            await session.close()
            raise WorkerLostError(f"{card.url} is another incarnation now")
        connection = cls(session)

        def on_message(message: WorkerMessage) -> None:
            if isinstance(message, Telemetry):
                on_telemetry(message)
            else:
                connection._deliver(message)

        def on_closed() -> None:
            on_lost()  # first: requests that fail ask who is left, and when to come again
            connection._lose_all()

        session.start(on_message, on_closed)
        return connection

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._queues)

    def announce(self, pool: PrefillPool) -> None:
        """Tell a decode worker which prefill workers there are."""
        self._session.send(pool)

    async def generate(self, request: Submit) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs, joining what has piled up; closing it aborts the request.

        Raises:
            WorkerBusyError: The worker has no room, or will stop; nothing was done.
            WorkerLostError: The session ended first, the worker failed, or it gave the request
                back; outputs that came before are yielded first.
            ServiceStoppingError: From ``fail_all``.
            RequestError: The worker cannot take the request as it is.
        """
        queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._queues[request.request_id] = queue
        if self._session.is_closed:
            self._lose_all()
        self._session.send(request)
        is_finished = False
        try:
            while not is_finished:
                output = _joined(queue, await queue.get())
                is_finished = output.finish_reason is not None
                yield output
        except (WorkerLostError, WorkerBusyError, RequestError):
            is_finished = True  # there is nothing left to abort
            raise
        finally:
            self._queues.pop(request.request_id, None)
            if not is_finished:
                self._session.send(Abort(request.request_id))

    async def close(self) -> None:
        """End the session; requests in flight fail."""
        await self._session.close()

    def _deliver(self, message: WorkerMessage) -> None:
        if isinstance(message, StepOutput):
            for output in message.outputs:
                if queue := self._queues.get(output.request_id):
                    queue.put_nowait(output)
        elif isinstance(message, Refused) and (queue := self._queues.get(message.request_id)):
            queue.put_nowait(_refusal(message))

    def fail_all(self, error: AntiphonError) -> None:
        """End every request in flight with an error, after the outputs that have arrived."""
        for queue in self._queues.values():
            # An error holds the frames that raised it: one for all would keep what each request
            # has in memory, prompts too, until the last of them is over.
            queue.put_nowait(copy.copy(error))

    def _lose_all(self) -> None:
        name = f"{self.card.role} worker {self.card.replica_id}"
        self.fail_all(WorkerLostError(f"the {name} is gone"))


def _joined(queue: asyncio.Queue[_Item], item: _Item) -> RequestOutput:
    """Merge an output with those behind it; never waits, so no token is held back."""
    if isinstance(item, AntiphonError):
        raise item
    if queue.empty():
        return item
    token_ids, finish_reason = list(item.token_ids), item.finish_reason
    while not queue.empty():
        following = queue.get_nowait()
        if isinstance(following, AntiphonError):
            queue.put_nowait(following)  # after the tokens that came before it
            break
        token_ids += following.token_ids
        finish_reason = following.finish_reason
    return RequestOutput(
        item.request_id, token_ids, finish_reason, item.num_cached_tokens, item.timing
    )


def _refusal(message: Refused) -> AntiphonError:
    match message.kind:
        case RefusalKind.BUSY:
            return WorkerBusyError(message.reason)
        case RefusalKind.DRAINING:
            return WorkerDrainingError(message.reason)
        case RefusalKind.MOVED:
            return WorkerMovedError(message.reason)
        case RefusalKind.INVALID:
            return RequestError(message.reason)
        case RefusalKind.FAILED | RefusalKind.LINK_BROKEN:
            return WorkerLostError(message.reason)

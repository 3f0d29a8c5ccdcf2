"""The generations of one HTTP request: side by side, watched, and never left behind.

    with slots.hold(n):                     admission: refused at once when full
        async with Generations(...):        one task per choice; leaving closes every generator
            await unless_disconnected(...)  the answer is written while the client is watched

Each generation is drained by a task of its own, so outputs that pile up while the client reads
slowly become one batch, and there is no timer. What piles up is bounded by max_tokens.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Self

from starlette.types import Receive

from antiphon.deployment.backend import Backend
from antiphon.deployment.journey import Journey
from antiphon.errors import CapacityError, InvalidParameterError, WorkerLostError
from antiphon.messages import RequestOutput, SamplingParams
from antiphon.router.retry_after import Turnover

_CLOSE_SECONDS = 10.0  # for backends to let go of cancelled work; then it is logged and left

logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class Slots:
    """Bounds the generations of one process."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._num_held = 0
        self._turnover = Turnover()

    @contextmanager
    def hold(self, count: int, parameter: str = "n") -> Iterator[Callable[[], None]]:
        """Hold slots; yield a function that gives them back before the end of the block.

        Args:
            count: How many.
            parameter: Of the request, that asks for so many.

        Raises:
            InvalidParameterError: More than there are at all.
            CapacityError: More than are free now; none was taken.
        """
        if count > self._max_concurrent:
            raise InvalidParameterError(
                parameter,
                f"the request asks for {count} choices in all, "
                f"this endpoint serves {self._max_concurrent} at once",
            )
        num_missing = self._num_held + count - self._max_concurrent
        if num_missing > 0:
            error = CapacityError(
                f"{self._num_held} of {self._max_concurrent} concurrent requests are being served"
            )
            error.retry_after_seconds = self._turnover.seconds(num_missing, self._num_held)
            raise error
        self._num_held += count
        with ExitStack() as held:
            held.callback(self._give_back, count, time.monotonic())
            yield held.close

    def _give_back(self, count: int, held_since: float) -> None:
        self._num_held -= count
        self._turnover.ended(time.monotonic() - held_since)


@dataclass(frozen=True, slots=True)
class Choice:
    """One generation to run."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    counts_prompt: bool  # whether this is the first choice of its prompt
    journey: Journey


class Generations:
    """Runs choices side by side and hands out what arrived, in order of arrival."""

    def __init__(self, backend: Backend, request_id: str, choices: Sequence[Choice]) -> None:
        self._backend = backend
        # Clients may reuse a request id; the workers' ids must be unique.
        self._request_id = f"{request_id}-{secrets.token_hex(4)}"
        self._choices = choices
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: set[int] = set()  # choices with a finish reason, or stopped
        self._arrived: list[tuple[int, RequestOutput]] = []
        self._error: Exception | None = None
        self._has_news = asyncio.Event()
        self._has_delivered = False

    async def __aenter__(self) -> Self:
        for index, choice in enumerate(self._choices):
            self._tasks.append(asyncio.create_task(self._drain(index, choice)))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for index, task in enumerate(self._tasks):
            self._ended.add(index)
            if not task.done():
                task.cancel()
        _, pending = await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
        if pending:
            logger.error("request %s: %d generations do not end", self._request_id, len(pending))

    async def batch(self) -> list[tuple[int, RequestOutput]]:
        """Wait for outputs; return all that have arrived, each with the index of its choice.

        Raises:
            AntiphonError: A generation failed. Outputs that came before the failure are returned
                first, unless none was returned yet: then the whole request fails cleanly.
        """
        await self._has_news.wait()
        if self._error is not None and not (self._arrived and self._has_delivered):
            raise self._error
        if self._error is None:
            self._has_news.clear()
        self._has_delivered = True
        arrived, self._arrived = self._arrived, []
        return arrived

    def stop(self, index: int) -> None:
        """End one choice early; its generator is closed, which aborts the work."""
        if index not in self._ended:
            self._ended.add(index)
            self._tasks[index].cancel()

    async def _drain(self, index: int, choice: Choice) -> None:
        request_id = f"{self._request_id}-{index}"
        outputs = self._backend.generate(
            request_id, choice.prompt_token_ids, choice.sampling, choice.journey
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if output.finish_reason is not None:
                        self._ended.add(index)
                    self._arrived.append((index, output))
                    self._has_news.set()
                    if output.finish_reason is not None:
                        return
            raise WorkerLostError(f"the output of {request_id} ended without a finish reason")
        except asyncio.CancelledError:
            self._fail(index, WorkerLostError(f"{request_id} was cancelled from below"))
            raise
        except Exception as error:
            self._fail(index, error)

    def _fail(self, index: int, error: Exception) -> None:
        if index not in self._ended:
            self._error = self._error or error
            self._has_news.set()
        elif not isinstance(error, WorkerLostError):
            logger.warning("request %s: closing failed", self._request_id, exc_info=error)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, or cancel it as soon as the client disconnects.

    Raises:
        ClientGone: The client left first; the work was cancelled and has ended.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait((working, watching), timeout=_CLOSE_SECONDS)


async def _disconnect(receive: Receive) -> None:
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception:
        logger.warning("the connection to a client cannot be watched any more", exc_info=True)

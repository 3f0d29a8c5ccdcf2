"""A decode worker's sessions with prefill workers, opened on first use and shared.

A peer that cannot be reached costs a request at most ``CONNECT_SECONDS``: on one network a session
opens in milliseconds, and there are other rungs on the ladder.
"""

import asyncio
from collections.abc import Callable

from antiphon.errors import LinkBrokenError
from antiphon.messages import PrefillPeer, WorkerMessage
from antiphon.workers.session import SILENCE_SECONDS, ClientSession

CONNECT_SECONDS = 1.0


class Peers:
    """Caches one session per prefill incarnation.

    Args:
        client_id: Of this worker.
        silence_seconds: After which a peer that answers no ping is gone.
    """

    def __init__(self, client_id: str, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._client_id = client_id
        self._silence_seconds = silence_seconds
        self._sessions: dict[str, asyncio.Task[ClientSession]] = {}

    async def get(
        self,
        peer: PrefillPeer,
        on_message: Callable[[ClientSession, WorkerMessage], None],
        on_lost: Callable[[ClientSession], None],
    ) -> ClientSession:
        """Return the open session with a peer, or open one.

        Raises:
            LinkBrokenError: The peer cannot be reached, or another incarnation lives there now.
        """
        task = self._sessions.get(peer.incarnation)
        if task is None:
            task = asyncio.create_task(self._open(peer, on_message, on_lost))
            self._sessions[peer.incarnation] = task
            task.add_done_callback(lambda task: self._forget_failed(peer.incarnation, task))
        # Shielded: one request's abort must not take the connection from the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Close every session, all at once: one whose peer hangs takes seconds."""
        closing = []
        for task in tuple(self._sessions.values()):
            if task.done() and not task.cancelled() and task.exception() is None:
                closing.append(task.result().close())
            else:
                task.cancel()
        await asyncio.gather(*closing)
        self._sessions.clear()

    def _forget_failed(self, incarnation: str, task: asyncio.Task[ClientSession]) -> None:
        """Let the next request try again; also retrieves the error if nobody waits any more."""
        failed = task.cancelled() or task.exception() is not None
        if failed and self._sessions.get(incarnation) is task:
            del self._sessions[incarnation]

    async def _open(
        self,
        peer: PrefillPeer,
        on_message: Callable[[ClientSession, WorkerMessage], None],
        on_lost: Callable[[ClientSession], None],
    ) -> ClientSession:
        session = await ClientSession.connect(
            peer.url,
            self._client_id,
            peer.session_key,
            timeout=CONNECT_SECONDS,
            silence_seconds=self._silence_seconds,
        )
        if session.card.incarnation != peer.incarnation:
            await session.close()
            raise LinkBrokenError(f"another incarnation of the prefill worker is at {peer.url} now")

        def on_closed() -> None:
            self._sessions.pop(peer.incarnation, None)
            on_lost(session)

        session.start(lambda message: on_message(session, message), on_closed)
        return session

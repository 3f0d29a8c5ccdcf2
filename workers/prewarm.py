"""Makes a decode worker's links before requests want them.

    ingress ──PrefillPool──▶ decode worker ──Prewarm(link)──▶ prefill worker ──connects──▶ link

The first request of a pair then pays for no session and no link. It is a favour and never a
condition: nothing waits for it, a failure is logged and counted, and a link that could not be
made, or that broke since, is made by the first request as if nobody had tried. What fails before
there is a link is counted here, a link that is refused, breaks or is not answered by the receiver.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence

from antiphon.errors import AntiphonError, PrefillFailedError
from antiphon.messages import PrefillPeer
from antiphon.workers.prefill_client import PrefillClient

logger = logging.getLogger(__name__)

_MAX_SEEN = 4096  # prefill workers come and go


class LinkPrewarmer:
    """Takes in which prefill workers there are; on the event loop.

    Args:
        client: Has the sessions with prefill workers, and the receiver that counts failures.
    """

    def __init__(self, client: PrefillClient) -> None:
        self._client = client
        self._seen: OrderedDict[str, None] = OrderedDict()  # incarnations, latest named last
        self._waiting: list[PrefillPeer] = []
        self._task: asyncio.Task[None] | None = None

    def update(self, peers: Sequence[PrefillPeer]) -> None:
        """Warm the links to those that are new, the newest first, one after the other."""
        for peer in peers:
            if peer.incarnation not in self._seen:
                self._waiting.append(peer)
            self._seen[peer.incarnation] = None
            self._seen.move_to_end(peer.incarnation)
        while len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._warm_all())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _warm_all(self) -> None:
        while self._waiting:
            peer = self._waiting.pop()
            try:
                await self._client.prewarm(peer)
            except AntiphonError as error:
                has_session = not isinstance(error, PrefillFailedError)
                reason = "no_link" if has_session else "unreachable"
                self._client.receiver.tally.prewarm_failed(reason)
                logger.warning("no link to %s was prewarmed (%s): %s", peer.name, reason, error)

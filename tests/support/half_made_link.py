"""A transport whose first link gets half made, as where no file descriptor is free at one end."""

from typing import Any

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.transport import Link


class HalfMade(GlooTransport):
    """Meets the other end, then fails to join it; the other end is not told and waits."""

    num_joined = 0

    def _join(self, store: Any, link_id: str, rank: int, timeout_seconds: float) -> Link:
        self.num_joined += 1
        if self.num_joined == 1:
            raise LinkBrokenError("no file descriptor is free")
        return super()._join(store, link_id, rank, timeout_seconds)

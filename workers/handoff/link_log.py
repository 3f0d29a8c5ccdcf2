"""What an end of a hand-off says in its log: whom a link is with, what became of it, and why.

    broke, rejected, quarantined    each time: a transfer or memory is lost with it
    refused, discarded              seldom: whoever is refused, or late, comes again

Lines name transfers by their ids; the services name the requests that these belong to.
"""

import logging
from collections.abc import Iterable

from antiphon.errors import HandoffError
from antiphon.workers.seldom_log import SeldomLog

logger = logging.getLogger(__name__)

_MAX_NAMED = 8


class LinkLog:
    """The log of one end, sender or receiver; from any thread."""

    def __init__(self) -> None:
        self._seldom = SeldomLog(logger)

    def broke(
        self, peer: str, link_id: str, error: HandoffError, transfer_ids: Iterable[str]
    ) -> None:
        """A link that this worker did not close has ended."""
        ids = list(transfer_ids)
        more = f" and {len(ids) - _MAX_NAMED} more" if len(ids) > _MAX_NAMED else ""
        logger.log(
            logging.WARNING if ids else logging.INFO,
            "link %s with %s broke: %s; with it failed %s%s",
            link_id, peer, error, ", ".join(ids[:_MAX_NAMED]) or "no transfer", more,
        )  # fmt: skip

    def refused(self, peer: str, link_id: str, reason: str, error: HandoffError) -> None:
        """The two ends of a link do not go together."""
        subject = "refused", peer, reason
        message = "link %s with %s was refused (%s): %s"
        self._seldom.log(logging.WARNING, subject, message, link_id, peer, reason, error)

    def not_prewarmed(self, peer: str, link_id: str) -> None:
        """Nobody connected to a link that no transfer wanted yet."""
        message = "link %s was offered to %s, which did not connect"
        self._seldom.log(logging.WARNING, ("silent", peer), message, link_id, peer)

    def rejected(self, peer: str, transfer_id: str, error: HandoffError) -> None:
        """A segment fails its transfer."""
        logger.warning("transfer %s from %s: segment rejected: %s", transfer_id, peer, error)

    def discarded(self, peer: str, transfer_id: str, reason: str) -> None:
        """A message says nothing about a live transfer."""
        message = "a message from %s was thrown away (%s), for transfer %s"
        self._seldom.log(
            logging.INFO, ("discarded", peer, reason), message, peer, reason, transfer_id
        )

    def quarantined(self, peer: str, link_id: str, num_bytes: int) -> None:
        """A link was given up whose peer may still write to its staging."""
        logger.warning(
            "link %s with %s is given up: %d bytes of staging stay with it until it ends",
            link_id, peer, num_bytes,
        )  # fmt: skip

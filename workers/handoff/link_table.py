"""A receiver's links: the one that each peer is offered, and those that others took the place of.

    offered ──retired, or its peer lost──▶ kept for its transfers ──the last one ended──▶ closed
       └──────the same, while it is idle, or it has to make room─────────────────────────────┘

Whoever takes an idle link out closes it, because no transfer's end will. That may wait, so it is
done by the receiver, whose lock guards all of this.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from antiphon.errors import WorkerBusyError

if TYPE_CHECKING:
    from antiphon.workers.handoff.receiver_link import ReceiverLink


class LinkTable:
    """Links by id, and the current one of each peer.

    Args:
        max_links: Bound of all of them.
    """

    def __init__(self, max_links: int) -> None:
        self._max_links = max_links
        self._links: dict[str, ReceiverLink] = {}
        self._current: dict[str, ReceiverLink] = {}  # by peer, least recently offered first

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator["ReceiverLink"]:
        return iter(self._links.values())

    @property
    def is_full(self) -> bool:
        """Whether a further link takes the place of another."""
        return len(self._links) >= self._max_links

    @property
    def given_up(self) -> list["ReceiverLink"]:
        """Links that are not offered any more."""
        return [link for link in self if not self.is_current(link)]

    def get(self, link_id: str) -> "ReceiverLink | None":
        """The link with this id."""
        return self._links.get(link_id)

    def current(self, peer_incarnation: str) -> "ReceiverLink | None":
        """What a peer is offered."""
        return self._current.get(peer_incarnation)

    def is_current(self, link: "ReceiverLink") -> bool:
        """Whether a link is what its peer is offered."""
        return self._current.get(link.peer_incarnation) is link

    def of_peer(self, peer_incarnation: str) -> list["ReceiverLink"]:
        """The links of a peer, the current one first."""
        links = [link for link in self if link.peer_incarnation == peer_incarnation]
        return sorted(links, key=lambda link: not self.is_current(link))

    def offer(self, link: "ReceiverLink") -> None:
        """Note that a link, old or new, was offered just now."""
        self._links[link.link_id] = link
        self._current.pop(link.peer_incarnation, None)
        self._current[link.peer_incarnation] = link

    def make_room(self) -> "ReceiverLink | None":
        """Take out the idle link that was used longest ago, if a further one needs its place.

        Raises:
            WorkerBusyError: All are in use.
        """
        if not self.is_full:
            return None
        for link in [*self._current.values(), *self._links.values()]:
            if not link.transfers:
                self.drop(link)
                return link
        raise WorkerBusyError(f"all {len(self._links)} hand-off links of this worker are in use")

    def retire(self, link: "ReceiverLink") -> bool:
        """Offer a link no more; returns whether it was idle, and is out."""
        if self.is_current(link):
            del self._current[link.peer_incarnation]
        if link.transfers:
            return False
        self._links.pop(link.link_id, None)
        return True

    def leave(self, peer_incarnation: str) -> list["ReceiverLink"]:
        """Offer a peer no link of before; returns its idle ones, which are out."""
        return [link for link in self.of_peer(peer_incarnation) if self.retire(link)]

    def drop(self, link: "ReceiverLink") -> None:
        """Take a link out; harmless if it is out already."""
        self._links.pop(link.link_id, None)
        if self.is_current(link):
            del self._current[link.peer_incarnation]

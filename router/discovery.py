"""How the cards of the workers reach this process: a directory that Serve's router writes to.

    worker replica    record_replica_metadata() -> pack_card(card)
    Serve controller  carries it with the list of running replicas
    this process      DiscoveringRouter -> publish -> listeners of ``DIRECTORY``

The directory is one per process, and a module's global, because Ray Serve creates the router
objects itself and accepts nothing but JSON for them. It has a module of its own because Serve
pickles the module of a router class by value: a directory defined there would be copied, one for
each router.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from antiphon.messages import WorkerCard

logger = logging.getLogger(__name__)

Deployment = tuple[str, str]  # application, deployment
Listener = Callable[[Mapping[str, WorkerCard]], None]

_CARD_KEY = "antiphon_worker_card"


def pack_card(card: WorkerCard) -> dict[str, Any]:
    """Return what a worker replica's ``record_replica_metadata`` has to return."""
    return {_CARD_KEY: msgspec.to_builtins(card)}


def unpack_card(metadata: Mapping[str, Any]) -> WorkerCard:
    """Read a card back.

    Raises:
        msgspec.ValidationError: There is no card, or one of another version of this package.
    """
    return msgspec.convert(metadata.get(_CARD_KEY), WorkerCard)


class WorkerDirectory:
    """The last known cards of each deployment's replicas. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._cards: dict[Deployment, Mapping[str, WorkerCard]] = {}
        self._listeners: dict[Deployment, list[Listener]] = {}

    def publish(self, deployment: Deployment, cards: Mapping[str, WorkerCard]) -> None:
        """Replace what is known of a deployment; listeners hear of it if it is new.

        Args:
            deployment: Whose replicas.
            cards: All its running replicas, by replica id.
        """
        with self._lock:
            if self._cards.get(deployment) == cards:
                return
            self._cards[deployment] = cards
            for listener in tuple(self._listeners.get(deployment, ())):
                self._tell(listener, deployment, cards)

    def listen(self, deployment: Deployment, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with what is known now and with every change; return how to stop.

        Calls come one at a time and in order, on the thread of whoever publishes and under the
        directory's lock: a listener hands the cards to its own event loop
        (``loop.call_soon_threadsafe``) and returns.
        """
        with self._lock:
            self._listeners.setdefault(deployment, []).append(listener)
            if deployment in self._cards:
                self._tell(listener, deployment, self._cards[deployment])

        def stop() -> None:
            with self._lock:
                if listener in self._listeners.get(deployment, ()):
                    self._listeners[deployment].remove(listener)

        return stop

    def _tell(
        self, listener: Listener, deployment: Deployment, cards: Mapping[str, WorkerCard]
    ) -> None:
        try:
            listener(cards)
        except Exception:  # it must not keep the news from others, nor end Serve's update loop
            logger.exception("a listener for the workers of %s failed", "/".join(deployment))


DIRECTORY = WorkerDirectory()


def publish(deployment: Deployment, cards: Mapping[str, WorkerCard]) -> None:
    """Replace what this process knows of a deployment."""
    DIRECTORY.publish(deployment, cards)

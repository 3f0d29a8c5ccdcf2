"""Where Prometheus finds every process: HTTP service discovery, and each ingress's own port.

Serve's proxy sends a request to any ingress, so what ``/metrics`` answers through it is that of one
of them, now this and now that. To be scraped, each has a port of its own. Which others there are an
ingress asks all of them, through Serve, when it is asked itself: there is no second list to go
stale. While some do not answer, those that did before stay listed, so that ``up`` shows them.
Workers are those that Serve lists, connected or not, for the same reason; one that it stops stays a
target while it has a session with the ingress that answers.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from antiphon.messages import WorkerCard

logger = logging.getLogger(__name__)

ASK_SECONDS = 2.0  # for all ingresses to answer; Prometheus itself waits 10


class IngressAddress(msgspec.Struct, frozen=True):
    """Where one ingress is scraped."""

    replica_id: str
    node: str
    host_port: str


AskAll = Callable[..., Awaitable[Sequence[Any]]]  # seconds, a method's name, its arguments
_Answer = TypeVar("_Answer")


def readable(answers: Sequence[Any], wanted: type[_Answer]) -> list[_Answer]:
    """What ingresses answered, without failures and what one of another version says."""
    found = []
    for answer in answers:
        if isinstance(answer, BaseException):
            continue
        try:
            found.append(msgspec.convert(answer, wanted))
        except msgspec.ValidationError as error:
            logger.warning("an ingress, of another version perhaps, is not understood: %s", error)
    return found


class Siblings:
    """All ingresses of this application.

    Args:
        own: This one.
        ask_all: Calls a method of every ingress, this one too, for so many seconds; gives what it
            returns, or an exception, for each.
    """

    def __init__(self, own: IngressAddress, ask_all: AskAll) -> None:
        self._own = own
        self._ask_all = ask_all
        self._known: dict[str, IngressAddress] = {}

    async def addresses(self) -> list[IngressAddress]:
        """Ask them; bounded by ``ASK_SECONDS``."""
        answers: Sequence[Any] = ()
        told: list[IngressAddress] = []
        try:
            async with asyncio.timeout(ASK_SECONDS):
                answers = await self._ask_all(ASK_SECONDS, "describe")
            told = readable(answers, IngressAddress)
        except Exception as error:
            logger.warning("the other ingresses cannot be asked for their metrics: %r", error)
        if not answers or len(told) < len(answers):
            logger.warning("%d of %d ingresses say where they are scraped", len(told), len(answers))
        else:
            self._known = {}
        self._known.update({address.replica_id: address for address in (*told, self._own)})
        return list(self._known.values())


def discovered(
    ingresses: Iterable[IngressAddress], workers: Iterable[WorkerCard]
) -> list[dict[str, Any]]:
    """The answer to Prometheus' HTTP service discovery: each process once."""
    targets = [_target(x.host_port, "ingress", x.replica_id, x.node) for x in ingresses]
    targets += [_target(urlsplit(c.url).netloc, c.role, c.replica_id, c.node) for c in workers]
    return sorted(targets, key=lambda target: (target["labels"]["pool"], target["targets"]))


def _target(host_port: str, pool: str, replica_id: str, node: str) -> dict[str, Any]:
    labels = {"__metrics_path__": "/metrics", "pool": pool, "worker": replica_id, "node": node}
    return {"targets": [host_port], "labels": labels}

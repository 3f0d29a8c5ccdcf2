"""Links over gloo: a private two-rank process group per link.

Rank 0 accepts, rank 1 connects. The accepting transport hosts a ``TCPStore`` on its own interface,
through which the two find each other:

    <link id>/connected   set once: by the connecting end to a token of its own, or by the accepting
                          end to "refused"
    <link id>/group/...   gloo's own addresses

What was found out about gloo in torch 2.13, and is relied on here (the transport tests check it):

* A wait that times out closes the pair, at both ends. So a wait can't be cut into short ones, and
  the one way to unblock a thread in ``wait`` is to let another operation of the same group time
  out: ``close`` posts a receive that nobody will serve and waits for it for a millisecond.
  ``abort`` and ``shutdown`` leave a waiting thread blocked until its own time-out.
* A posted receive costs no CPU while it waits, and learns of the peer's death within milliseconds.
* A send completes when the peer has posted the receive, so a slow receiver holds the sender back.
* A receive may be longer than what is sent, so header and payload are one message, and receives
  can be posted before anybody knows what will come.
* A client of ``TCPStore`` keeps its time-out while it connects and while it waits for a key, and
  has none for any other answer, and the kernel takes what is asked for a process that is stopped.
  So the end that connects is also bounded from outside (``BoundedCalls``).
"""

import contextlib
import functools
import socket
import threading
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from antiphon.errors import LinkBrokenError
from antiphon.workers.handoff.batch_thread import batch_threads
from antiphon.workers.handoff.bounded_calls import BoundedCalls
from antiphon.workers.handoff.transport import Link, Place

_c10d: Any = torch.distributed  # its stubs lack what is used here
_DATA_TAG = 1
_CLOSE_TAG = 2  # nothing is ever sent with it
_REFUSED = b"refused"
_GRACE_SECONDS = 1.0  # a time-out of what is called comes first, and says more
_MAX_ENDED = 100  # links whose keys are kept, so that a peer that comes late is refused at once
_FOREVER = timedelta(days=365)


class GlooLink(Link):
    """One end of a two-rank group.

    Args:
        group: Connected.
        peer_rank: Of the other end.
    """

    def __init__(self, group: Any, peer_rank: int) -> None:
        self._group: Any | None = group
        self._peer_rank = peer_rank
        self._lock = threading.Lock()

    def start_send(self, tensors: Sequence[Tensor]) -> "GlooPending":
        """See ``Link.start_send``."""
        group = self._live_group()
        try:
            works = [group.send([tensor], self._peer_rank, _DATA_TAG) for tensor in tensors]
        except RuntimeError as error:
            raise self.broken(error) from error
        return GlooPending(self, works)

    def start_recv(self, tensor: Tensor) -> "GlooPending":
        """See ``Link.start_recv``."""
        group = self._live_group()
        try:
            return GlooPending(self, [group.recv([tensor], self._peer_rank, _DATA_TAG)])
        except RuntimeError as error:
            raise self.broken(error) from error

    def close(self) -> None:
        """See ``Link.close``."""
        with self._lock:
            group, self._group = self._group, None
        if group is None:
            return
        with contextlib.suppress(RuntimeError):  # the time-out is what closes the pair
            never_sent = torch.empty(1, dtype=torch.uint8)
            group.recv([never_sent], self._peer_rank, _CLOSE_TAG).wait(timedelta(milliseconds=1))

    def broken(self, error: RuntimeError) -> LinkBrokenError:
        """Close the link, and say why it broke."""
        closed_here = self._group is None
        self.close()
        if closed_here:
            return LinkBrokenError("the link was closed at this end")
        return LinkBrokenError(f"the link broke: {_first_line(error)}")

    def _live_group(self) -> Any:
        group = self._group
        if group is None:
            raise LinkBrokenError("the link was closed at this end")
        return group


class GlooPending:
    """Works of one group, in the order they were posted."""

    def __init__(self, link: GlooLink, works: Sequence[Any]) -> None:
        self._link = link
        self._works = works

    def wait(self, timeout_seconds: float | None) -> None:
        """See ``Pending.wait``."""
        timeout = _FOREVER if timeout_seconds is None else timedelta(seconds=timeout_seconds)
        try:
            for work in self._works:
                work.wait(timeout)
        except RuntimeError as error:
            raise self._link.broken(error) from error


class GlooTransport:
    """Makes gloo links.

    Args:
        host: Address of the interface to use, both for the rendezvous and for KV. Peers must be
            able to reach it. Nothing is authenticated: use a private network.
    """

    place = Place.HOST

    def __init__(self, host: str) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._rendezvous: Any | None = None
        self._connects: BoundedCalls[Link] = BoundedCalls("connecting a link")
        self._accepting: set[str] = set()
        self._ended: dict[str, None] = {}  # links that were refused, oldest first
        self._closed = False

    @property
    def address(self) -> str:
        """See ``Transport.address``; the first use starts to listen."""
        return f"{self._host}:{self._store().port}"

    def accept(
        self, link_id: str, timeout_seconds: float, set_up_seconds: float | None = None
    ) -> Link:
        """See ``Transport.accept``."""
        # A client of its own: a TCPStore client serves one waiting thread at a time.
        store = self._client(self._host, self._store().port, timeout_seconds)
        with self._lock:
            self._accepting.add(link_id)
            if self._closed:
                raise LinkBrokenError("the transport is closed")
        try:
            token = self._wait_for_peer(store, link_id, timeout_seconds)
        finally:
            with self._lock:
                self._accepting.discard(link_id)
        if token == _REFUSED:
            raise LinkBrokenError("the link was refused at this end")
        return self._join(store, link_id, 0, set_up_seconds or timeout_seconds)

    def connect(self, address: str, link_id: str, timeout_seconds: float) -> Link:
        """See ``Transport.connect``."""
        make = functools.partial(self._connect, address, link_id, timeout_seconds)
        return self._connects.run(make, timeout_seconds + _GRACE_SECONDS)

    def _connect(self, address: str, link_id: str, timeout_seconds: float) -> Link:
        host, _, port = address.rpartition(":")
        _probe(host, int(port), timeout_seconds)
        store = self._client(host, int(port), timeout_seconds)
        token = uuid.uuid4().hex
        try:
            found = store.compare_set(_key(link_id), "", token)
        except RuntimeError as error:
            raise LinkBrokenError(f"{address}: {_first_line(error)}") from error
        if found != token.encode():
            why = "refuses the link" if found == _REFUSED else "uses the link with another worker"
            raise LinkBrokenError(f"the worker at {address} {why}")
        return self._join(store, link_id, 1, timeout_seconds)

    def refuse(self, link_id: str) -> None:
        """See ``Transport.refuse``."""
        with contextlib.suppress(RuntimeError):  # only if the rendezvous is gone already
            self._store().set(_key(link_id), _REFUSED.decode())
            self._forget_before(link_id)

    def close(self) -> None:
        """See ``Transport.close``."""
        with self._lock:
            self._closed = True
            accepting = list(self._accepting)
        for link_id in accepting:
            self.refuse(link_id)

    def _forget_before(self, link_id: str) -> None:
        """Delete the keys of the link that has ended longest ago, if enough have ended since."""
        with self._lock:
            self._ended.pop(link_id, None)
            self._ended[link_id] = None
            if len(self._ended) <= _MAX_ENDED:
                return
            oldest = next(iter(self._ended))
            del self._ended[oldest]
        store = self._store()
        for key in store.list_keys():
            if key.startswith(f"{oldest}/"):
                store.delete_key(key)

    def _store(self) -> Any:
        with self._lock:
            if self._rendezvous is None:
                self._rendezvous = self._listen()
            return self._rendezvous

    def _listen(self) -> Any:
        # TCPStore itself would listen on every interface.
        family, _, _, _, bind_address = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((bind_address[0], 0))
            listener.listen()
            port = listener.getsockname()[1]
            return _c10d.TCPStore(
                self._host,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),  # the store closes it
            )

    @staticmethod
    def _client(host: str, port: int, timeout_seconds: float) -> Any:
        try:
            return _c10d.TCPStore(host, port, timeout=timedelta(seconds=timeout_seconds))
        except RuntimeError as error:
            raise LinkBrokenError(f"{host}:{port}: {_first_line(error)}") from error

    def _wait_for_peer(self, store: Any, link_id: str, timeout_seconds: float) -> bytes:
        try:
            store.wait([_key(link_id)], timedelta(seconds=timeout_seconds))
            return bytes(store.get(_key(link_id)))
        except _c10d.DistStoreError:
            raise TimeoutError(f"nobody connected in {timeout_seconds} s") from None
        except RuntimeError as error:
            raise LinkBrokenError(f"the rendezvous failed: {_first_line(error)}") from error

    def _join(self, store: Any, link_id: str, rank: int, timeout_seconds: float) -> Link:
        """Make one end of a link, once both ends have found each other."""
        return self._join_gloo(store, link_id, rank, timeout_seconds)

    def _join_gloo(self, store: Any, link_id: str, rank: int, timeout_seconds: float) -> GlooLink:
        options = _c10d.ProcessGroupGloo._Options()
        with batch_threads():
            device = _c10d.ProcessGroupGloo.create_device(hostname=self._host, lazy_init=False)
        options._devices = [device]
        options._timeout = timedelta(seconds=timeout_seconds)
        options._threads = 1
        prefix = _c10d.PrefixStore(f"{link_id}/group", store)
        try:
            return GlooLink(_c10d.ProcessGroupGloo(prefix, rank, 2, options), 1 - rank)
        except RuntimeError as error:
            raise LinkBrokenError(f"link set-up failed: {_first_line(error)}") from error


def _probe(host: str, port: int, timeout_seconds: float) -> None:
    """Fail at once where nobody listens; TCPStore would retry, and log, until its time-out."""
    try:
        socket.create_connection((host, port), timeout_seconds).close()
    except OSError as error:
        raise LinkBrokenError(f"nobody listens at {host}:{port}: {error}") from error


def _key(link_id: str) -> str:
    return f"{link_id}/connected"


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]

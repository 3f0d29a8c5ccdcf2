"""Makes one link as workers do, and measures it.

The sending end commands: a message of 8 bytes holds a number, then so many pieces follow, then the
receiving end answers with the same number.

    0          a round trip
    n          n pieces, all of them posted at once at both ends, as a long prompt's segments are
    -1         the end
"""

import logging
import statistics
import time

import torch

from antiphon.errors import AntiphonError
from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.nccl import NcclTransport
from antiphon.workers.handoff.transport import Link, Place, Transport

logger = logging.getLogger(__name__)

_PIECE_BYTES = 8 << 20
_MAX_PIECES = 32
_MEASURE_SECONDS = 0.2
_NUM_ROUND_TRIPS = 20
_END = -1


def make_transport(name: str, host: str) -> Transport:
    """What carries KV.

    Raises:
        ConfigError: It cannot work here.
    """
    return NcclTransport(host) if name == "nccl" else GlooTransport(host)


def serve_link(transport: Transport, link_id: str, timeout_seconds: float) -> None:
    """Be the receiving end until the other one is done. What fails is for that one to report."""
    try:
        link = transport.accept(link_id, timeout_seconds)
        try:
            _obey(link, transport.place, timeout_seconds)
        finally:
            link.close()
    except (AntiphonError, TimeoutError) as error:
        logger.info("link %s: %s", link_id, error)


def measure_link(
    transport: Transport, address: str, link_id: str, timeout_seconds: float
) -> tuple[float, float, float]:
    """Be the sending end; return seconds of set-up and of a round trip, and bytes per second.

    Raises:
        LinkBrokenError: There is no link, or an end did not act in time.
    """
    started_at = time.monotonic()
    link = transport.connect(address, link_id, timeout_seconds)
    setup_seconds = time.monotonic() - started_at
    try:
        trips = [_send(link, 0, None, timeout_seconds) for _ in range(_NUM_ROUND_TRIPS)]
        payload = _payload(transport.place)
        first_seconds = _send(link, 1, payload, timeout_seconds)  # also warms the link
        num_pieces = max(1, min(_MAX_PIECES, int(_MEASURE_SECONDS / first_seconds)))
        seconds = _send(link, num_pieces, payload, timeout_seconds)
        _send(link, _END, None, timeout_seconds)
    finally:
        link.close()
    return setup_seconds, statistics.median(trips), num_pieces * _PIECE_BYTES / seconds


def _obey(link: Link, place: Place, timeout_seconds: float) -> None:
    payload = _payload(place)
    message = torch.zeros(1, dtype=torch.int64)
    while message.item() != _END:
        link.recv(message.view(torch.uint8), timeout_seconds)
        receives = [link.start_recv(payload) for _ in range(int(message.item()))]
        for receive in receives:
            receive.wait(timeout_seconds)
        link.send([message.view(torch.uint8)], timeout_seconds)


def _send(link: Link, command: int, payload: torch.Tensor | None, timeout_seconds: float) -> float:
    """Give a command, with its pieces; return the seconds until it was answered."""
    message = torch.tensor([command]).view(torch.uint8)
    pieces = [payload] * command if payload is not None else []
    started_at = time.perf_counter()
    link.send([message, *pieces], timeout_seconds)
    link.recv(message, timeout_seconds)
    return time.perf_counter() - started_at


def _payload(place: Place) -> torch.Tensor:
    device = "cpu" if place is Place.HOST else "cuda"
    return torch.zeros(_PIECE_BYTES, dtype=torch.uint8, device=device)

"""Makes one link as workers do, and measures it.

Both ends know the exchanges: a message of 8 bytes and so many pieces of KV's size, all posted at
once at both ends as a long prompt's segments are, then the message comes back. Those without pieces
are round trips; the first piece warms the link, and the pieces after it give the rate.
"""

import logging
import statistics
import time

import torch

from antiphon.errors import AntiphonError
from antiphon.workers.handoff.transport import Link, Place, Transport

logger = logging.getLogger(__name__)

_PIECE_BYTES = 8 << 20
_NUM_PIECES = 8
_NUM_ROUND_TRIPS = 20
_EXCHANGES = (*[0] * _NUM_ROUND_TRIPS, 1, _NUM_PIECES)  # pieces in each


def serve_link(transport: Transport, link_id: str, timeout_seconds: float) -> None:
    """Be the receiving end until the other one is done. What fails is for that one to report."""
    try:
        link = transport.accept(link_id, timeout_seconds)
        try:
            message, payload = _buffers(transport.place)
            for num_pieces in _EXCHANGES:
                link.recv(message, timeout_seconds)
                for receive in [link.start_recv(payload) for _ in range(num_pieces)]:
                    receive.wait(timeout_seconds)
                link.send([message], timeout_seconds)
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
        message, payload = _buffers(transport.place)
        seconds = [
            _exchange(link, message, [payload] * num_pieces, timeout_seconds)
            for num_pieces in _EXCHANGES
        ]
    finally:
        link.close()
    round_trip_seconds = statistics.median(seconds[:_NUM_ROUND_TRIPS])
    return setup_seconds, round_trip_seconds, _NUM_PIECES * _PIECE_BYTES / seconds[-1]


def _exchange(
    link: Link, message: torch.Tensor, pieces: list[torch.Tensor], timeout_seconds: float
) -> float:
    """Send and wait for the answer; return the seconds that it took."""
    started_at = time.perf_counter()
    link.send([message, *pieces], timeout_seconds)
    link.recv(message, timeout_seconds)
    return time.perf_counter() - started_at


def _buffers(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    device = "cpu" if place is Place.HOST else "cuda"
    payload = torch.zeros(_PIECE_BYTES, dtype=torch.uint8, device=device)
    return torch.zeros(8, dtype=torch.uint8), payload

"""The first exchange on a new link: each end says who it is and what its bytes mean.

    sender    HELLO(both epochs, wire format)  ->
              <-  HELLO(both epochs, wire format)    receiver

Both ends compare; both refuse with the same words, so the operator finds the reason in either log.
"""

import contextlib

import torch

from antiphon.errors import LayoutMismatchError, LinkBrokenError, SegmentRejectedError
from antiphon.workers.handoff.segment import (
    HEADER_BYTES,
    Epochs,
    Header,
    Kind,
    as_bytes,
    as_tensor,
    checksum,
)
from antiphon.workers.handoff.transport import Link
from antiphon.workers.handoff.wire import WireFormat

_MAX_DESCRIPTION_BYTES = 1 << 20


def greet(link: Link, wire: WireFormat, epochs: Epochs, timeout_seconds: float) -> None:
    """Do the sender's part.

    Raises:
        LinkBrokenError: The receiver did not answer.
        LayoutMismatchError: It has another wire format.
        SegmentRejectedError: It is not the incarnation that offered the link.
    """
    _say(link, wire, epochs, timeout_seconds)
    answer = _hear(link, epochs, timeout_seconds)
    wire.check_peer(answer, "the receiver")


def answer(link: Link, wire: WireFormat, epochs: Epochs, timeout_seconds: float) -> None:
    """Do the receiver's part; raises as ``greet`` does, after the sender was told."""
    greeting = _hear(link, epochs, timeout_seconds)
    _say(link, wire, epochs, timeout_seconds)
    try:
        wire.check_peer(greeting, "the sender")
    except LayoutMismatchError:
        _wait_for_hangup(link, timeout_seconds)  # closing now could overtake the answer
        raise


def _wait_for_hangup(link: Link, timeout_seconds: float) -> None:
    with contextlib.suppress(LinkBrokenError):
        link.recv(torch.empty(1, dtype=torch.uint8), timeout_seconds)


def _say(link: Link, wire: WireFormat, epochs: Epochs, timeout_seconds: float) -> None:
    description = as_tensor(wire.describe())
    header = Header(
        Kind.HELLO,
        epochs,
        num_payload_bytes=description.numel(),
        payload_checksum=checksum(description),
    )
    link.send([as_tensor(header.pack()), description], timeout_seconds)


def _hear(link: Link, epochs: Epochs, timeout_seconds: float) -> bytes:
    raw = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    link.recv(raw, timeout_seconds)
    header = Header.unpack(as_bytes(raw))
    if header.kind is not Kind.HELLO or header.num_payload_bytes > _MAX_DESCRIPTION_BYTES:
        raise SegmentRejectedError("the link did not begin with a handshake")
    description = torch.empty(header.num_payload_bytes, dtype=torch.uint8)
    link.recv(description, timeout_seconds)
    if checksum(description) != header.payload_checksum:
        raise SegmentRejectedError("handshake: wrong payload checksum")
    for end in ("sender", "receiver"):
        if getattr(header.epochs, end) != getattr(epochs, end):
            raise SegmentRejectedError(
                f"handshake: {end} epoch is of another incarnation; the {end} has restarted"
            )
    return as_bytes(description)

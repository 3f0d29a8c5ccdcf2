"""The first exchange on a new link: each end says who it is and what its bytes mean.

    sender    HELLO(both epochs, wire format)  ->
              <-  HELLO(both epochs, wire format)    receiver

Both ends compare; both refuse with the same words, so the operator finds the reason in either log.
Of another version's hello nothing but the version is read. Nobody waits for an own hello to be
taken before the other's was heard: an end that reads no further would never take it.
"""

import contextlib
import time

import torch

from antiphon.errors import LayoutMismatchError, LinkBrokenError, SegmentRejectedError
from antiphon.workers.handoff.segment import (
    HEADER_BYTES,
    HEADER_VERSION,
    Epochs,
    Header,
    Kind,
    as_bytes,
    as_tensor,
    checksum,
    peer_version,
)
from antiphon.workers.handoff.transport import Link, Pending
from antiphon.workers.handoff.wire import WireFormat

_MAX_DESCRIPTION_BYTES = 1 << 20


def greet(link: Link, wire: WireFormat, epochs: Epochs, timeout_seconds: float) -> None:
    """Do the sender's part.

    Raises:
        LinkBrokenError: The receiver did not answer.
        LayoutMismatchError: It has another wire format, or speaks another version.
        SegmentRejectedError: It is not the incarnation that offered the link.
    """
    deadline = time.monotonic() + timeout_seconds
    said = _say(link, wire, epochs)
    wire.check_peer(_hear(link, epochs, "the receiver", timeout_seconds), "the receiver")
    said.wait(max(deadline - time.monotonic(), 0.001))


def answer(link: Link, wire: WireFormat, epochs: Epochs, timeout_seconds: float) -> None:
    """Do the receiver's part; raises as ``greet`` does, after the sender was told."""
    try:
        greeting = _hear(link, epochs, "the sender", timeout_seconds)
    except LayoutMismatchError:
        with contextlib.suppress(LinkBrokenError):  # the sender takes the header and hangs up
            _say(link, wire, epochs).wait(timeout_seconds)
        raise
    said = _say(link, wire, epochs)
    try:
        wire.check_peer(greeting, "the sender")
    except LayoutMismatchError:
        with contextlib.suppress(LinkBrokenError):  # closing now could overtake the answer
            link.recv(torch.empty(1, dtype=torch.uint8), timeout_seconds)
        raise
    said.wait(timeout_seconds)


def _say(link: Link, wire: WireFormat, epochs: Epochs) -> Pending:
    description = as_tensor(wire.describe())
    header = Header(
        Kind.HELLO,
        epochs,
        num_payload_bytes=description.numel(),
        payload_checksum=checksum(description),
    )
    return link.start_send([as_tensor(header.pack()), description])


def _hear(link: Link, epochs: Epochs, peer: str, timeout_seconds: float) -> bytes:
    tensor = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    link.recv(tensor, timeout_seconds)
    raw = as_bytes(tensor)
    version = peer_version(raw)
    if version not in (None, HEADER_VERSION):
        raise LayoutMismatchError(
            f"{peer} speaks version {version} of the hand-off, this worker version "
            f"{HEADER_VERSION}: run the same release in both pools"
        )
    header = Header.unpack(raw)
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

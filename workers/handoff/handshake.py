"""The first exchange on a new link: each end says who it is and what its bytes mean.

    sender    HELLO(both epochs, wire format)  ->
              <-  HELLO(both epochs, wire format)    receiver

Both ends compare; both refuse with the same words, so the operator finds the reason in either log.
Of another version's hello nothing but the version is read.
"""

import contextlib

import torch

from antiphon.errors import (
    HandoffError,
    LayoutMismatchError,
    LinkBrokenError,
    SegmentRejectedError,
)
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

_MAX_DESCRIPTION_BYTES = 64 << 10


def greet(link: Link, wire: WireFormat, epochs: Epochs, timeout_seconds: float) -> None:
    """Do the sender's part.

    Raises:
        LinkBrokenError: The receiver did not answer.
        LayoutMismatchError: It has another wire format, or speaks another version.
        SegmentRejectedError: It is not the incarnation that offered the link.
    """
    _say(link, wire, epochs).wait(timeout_seconds)
    wire.check_peer(_hear(link, epochs, "the receiver", timeout_seconds), "the receiver")


def answer(link: Link, wire: WireFormat, epochs: Epochs, timeout_seconds: float) -> None:
    """Do the receiver's part; raises as ``greet`` does, after the sender was told."""
    try:
        wire.check_peer(_hear(link, epochs, "the sender", timeout_seconds), "the sender")
    except LayoutMismatchError:
        with contextlib.suppress(LinkBrokenError):
            _say(link, wire, epochs).wait(timeout_seconds)
            # Closing now could overtake the answer: the sender hangs up.
            link.recv(torch.empty(1, dtype=torch.uint8), timeout_seconds)
        raise
    _say(link, wire, epochs).wait(timeout_seconds)


def refusal_reason(error: HandoffError) -> str | None:
    """Under what a link counts as refused that ended before its handshake did; None if it broke."""
    if isinstance(error, LayoutMismatchError):
        return error.reason
    return "stranger" if isinstance(error, SegmentRejectedError) else None


def _say(link: Link, wire: WireFormat, epochs: Epochs) -> Pending:
    description = as_tensor(wire.describe())
    header = Header(
        Kind.HELLO,
        epochs,
        num_payload_bytes=description.numel(),
        payload_checksum=checksum(description),
    )
    return link.start_send([torch.cat([as_tensor(header.pack()), description])])


def _hear(link: Link, epochs: Epochs, peer: str, timeout_seconds: float) -> bytes:
    hello = torch.empty(HEADER_BYTES + _MAX_DESCRIPTION_BYTES, dtype=torch.uint8)
    link.recv(hello, timeout_seconds)
    raw = as_bytes(hello[:HEADER_BYTES])
    version = peer_version(raw)
    if version not in (None, HEADER_VERSION):
        raise LayoutMismatchError(
            "version",
            f"{peer} speaks version {version} of the hand-off, this worker version "
            f"{HEADER_VERSION}: run the same release in both pools",
        )
    header = Header.unpack(raw)
    if header.kind is not Kind.HELLO or header.num_payload_bytes > _MAX_DESCRIPTION_BYTES:
        raise SegmentRejectedError("the link did not begin with a handshake")
    description = hello[HEADER_BYTES : HEADER_BYTES + header.num_payload_bytes]
    if checksum(description) != header.payload_checksum:
        raise SegmentRejectedError("handshake: wrong payload checksum")
    for end in ("sender", "receiver"):
        if getattr(header.epochs, end) != getattr(epochs, end):
            raise SegmentRejectedError(
                f"handshake: {end} epoch is of another incarnation; the {end} has restarted"
            )
    return as_bytes(description)

"""The header in front of everything that crosses a link.

    offset  0  magic             4 bytes, ``AKVS``
            4  version           u16
            6  kind              u16
            8  transfer id      16 bytes
           24  sender epoch      8 bytes   digest of the sender's incarnation
           32  receiver epoch    8 bytes   digest of the receiver's incarnation
           40  start, end        u64 each  token range
           56  payload bytes     u64
           64  payload checksum  u64       xxh3_64
           72  zeros
          120  header checksum   u64       xxh3_64 of bytes 0..119

Little endian. The header checksum comes first in parsing: a header that fails it says nothing
reliable about how many bytes follow, so the link is out of step and has to break. A payload that
fails its checksum costs only its transfer.
"""

import enum
import hashlib
import struct
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from antiphon.errors import SegmentRejectedError

HEADER_BYTES = 128
MAX_PAYLOAD_BYTES = 64 << 20  # what a receiver is ready to stage per link
NO_TRANSFER = bytes(16)

_MAGIC = b"AKVS"
_VERSION = 1
_BODY = struct.Struct("<4sHH16s8s8sQQQQ48x")
_CHECKSUM = struct.Struct("<Q")
assert _BODY.size + _CHECKSUM.size == HEADER_BYTES


class Kind(enum.IntEnum):
    """What a header announces."""

    HELLO = 1  # payload: the wire format of who says it; both ends say it once
    DATA = 2  # payload: KV of tokens [start, end)
    END = 3  # all of [start, end) was sent
    ABORT = 4  # payload: why the sender gave up


@dataclass(frozen=True, slots=True)
class Epochs:
    """Which incarnations of sender and receiver a segment belongs to."""

    sender: bytes
    receiver: bytes

    @classmethod
    def of(cls, sender_incarnation: str, receiver_incarnation: str) -> "Epochs":
        """Digest the incarnations' names."""
        return cls(_digest(sender_incarnation), _digest(receiver_incarnation))


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header."""

    kind: Kind
    epochs: Epochs
    transfer_id: bytes = NO_TRANSFER
    start: int = 0
    end: int = 0
    num_payload_bytes: int = 0
    payload_checksum: int = 0

    def pack(self) -> bytes:
        """The header's 128 bytes."""
        body = _BODY.pack(
            _MAGIC,
            _VERSION,
            self.kind,
            self.transfer_id,
            self.epochs.sender,
            self.epochs.receiver,
            self.start,
            self.end,
            self.num_payload_bytes,
            self.payload_checksum,
        )
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def unpack(cls, raw: bytes) -> "Header":
        """Parse and check a header.

        Raises:
            SegmentRejectedError: Names the field that is wrong.
        """
        body, (header_checksum,) = raw[: _BODY.size], _CHECKSUM.unpack(raw[_BODY.size :])
        if xxhash.xxh3_64_intdigest(body) != header_checksum:
            raise SegmentRejectedError("segment header: wrong header checksum")
        magic, version, kind, transfer_id, sender, receiver, *numbers = _BODY.unpack(body)
        start, end, num_payload_bytes, payload_checksum = numbers
        if magic != _MAGIC:
            raise SegmentRejectedError(f"segment header: magic is {magic!r}, expected {_MAGIC!r}")
        if version != _VERSION:
            raise SegmentRejectedError(f"segment header: version is {version}, not {_VERSION}")
        if kind not in Kind.__members__.values():
            raise SegmentRejectedError(f"segment header: kind {kind} is unknown")
        if start > end:
            raise SegmentRejectedError(f"segment header: token range [{start}, {end}) is reversed")
        if num_payload_bytes > MAX_PAYLOAD_BYTES:
            raise SegmentRejectedError(
                f"segment header: payload bytes {num_payload_bytes} exceed {MAX_PAYLOAD_BYTES}"
            )
        epochs = Epochs(sender, receiver)
        return cls(Kind(kind), epochs, transfer_id, start, end, num_payload_bytes, payload_checksum)


def checksum(payload: Tensor) -> int:
    """xxh3_64 of a contiguous uint8 tensor on the CPU."""
    return xxhash.xxh3_64_intdigest(payload.numpy().data)


def as_tensor(raw: bytes) -> Tensor:
    """A writable uint8 tensor with a copy of ``raw``."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0).byte()


def as_bytes(tensor: Tensor) -> bytes:
    """A copy of a uint8 tensor's bytes."""
    return tensor.numpy().tobytes()


def _digest(incarnation: str) -> bytes:
    return hashlib.blake2b(incarnation.encode(), digest_size=8).digest()

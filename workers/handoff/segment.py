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
           72  account           5 x u64   of END: ``SenderAccount``
          112  zeros
          120  header checksum   u64       xxh3_64 of bytes 0..119

Little endian. Magic and version keep their places in every version. The header checksum comes first
in parsing: a header that fails it says nothing reliable about how many bytes follow, so the link is
out of step and has to break. A payload that fails its checksum costs only its transfer.
"""

import enum
import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from antiphon.errors import SegmentRejectedError

HEADER_BYTES = 128
MAX_PAYLOAD_BYTES = 64 << 20  # the most that a segment may be configured to have
NO_TRANSFER = bytes(16)

_MAGIC = b"AKVS"
HEADER_VERSION = 3
_BODY = struct.Struct("<4sHH16s8s8sQQQQ5Q8x")
_PREFIX = struct.Struct("<4sH")
_CHECKSUM = struct.Struct("<Q")
_FACTOR_STEP = 0x9E3779B97F4A7C14 - 2**64  # even, with bits in every byte (the golden ratio's)
assert _BODY.size + _CHECKSUM.size == HEADER_BYTES


class Kind(enum.IntEnum):
    """What a header announces."""

    HELLO = 1  # payload: the wire format of who says it; both ends say it once
    DATA = 2  # payload: KV of tokens [start, end)
    END = 3  # all of [start, end) was sent
    ABORT = 4  # payload: why the sender gave up


_KINDS = {kind.value: kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Epochs:
    """Which incarnations of sender and receiver a segment belongs to."""

    sender: bytes
    receiver: bytes

    @classmethod
    def of(cls, sender_incarnation: str, receiver_incarnation: str) -> "Epochs":
        """Digest the incarnations' names."""
        return cls(_digest(sender_incarnation), _digest(receiver_incarnation))


class SenderAccount(NamedTuple):
    """What the sender says with END of how it came to the KV, by its own clock."""

    age_microseconds: int = 0  # since the last KV was computed
    queue_microseconds: int = 0  # until the first step for the prompt
    compute_microseconds: int = 0  # from there to the last KV
    send_microseconds: int = 0  # since the first segment
    num_cached_tokens: int = 0  # found in its prefix cache


_NO_ACCOUNT = SenderAccount()


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
    account: SenderAccount = _NO_ACCOUNT

    def pack(self) -> bytes:
        """The header's 128 bytes."""
        body = _BODY.pack(
            _MAGIC,
            HEADER_VERSION,
            self.kind,
            self.transfer_id,
            self.epochs.sender,
            self.epochs.receiver,
            self.start,
            self.end,
            self.num_payload_bytes,
            self.payload_checksum,
            *self.account,
        )
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def unpack(cls, raw: bytes) -> "Header":
        """Parse and check a header.

        Raises:
            SegmentRejectedError: Names the field that is wrong.
        """
        if _CHECKSUM.unpack_from(raw, _BODY.size)[0] != xxhash.xxh3_64_intdigest(raw[: _BODY.size]):
            raise SegmentRejectedError("segment header: wrong header checksum")
        magic, version, kind, transfer_id, sender, receiver, *numbers = _BODY.unpack_from(raw)
        start, end, num_payload_bytes, payload_checksum, *account = numbers
        if magic != _MAGIC:
            raise SegmentRejectedError(f"segment header: magic is {magic!r}, expected {_MAGIC!r}")
        if version != HEADER_VERSION:
            raise SegmentRejectedError(f"segment header: version {version}, not {HEADER_VERSION}")
        if kind not in _KINDS:
            raise SegmentRejectedError(f"segment header: kind {kind} is unknown")
        if start > end:
            raise SegmentRejectedError(f"segment header: token range [{start}, {end}) is reversed")
        if num_payload_bytes > MAX_PAYLOAD_BYTES:
            raise SegmentRejectedError(
                f"segment header: payload bytes {num_payload_bytes} exceed {MAX_PAYLOAD_BYTES}"
            )
        return cls(
            _KINDS[kind],
            Epochs(sender, receiver),
            transfer_id,
            start,
            end,
            num_payload_bytes,
            payload_checksum,
            SenderAccount(*account),
        )


def peer_version(raw: bytes) -> int | None:
    """The version of any version's header; None if it is no header."""
    magic, version = _PREFIX.unpack_from(raw)
    return int(version) if magic == _MAGIC else None


def checksum(payload: Tensor) -> int:
    """Of a contiguous 1-D uint8 tensor: xxh3_64 on the CPU, ``device_checksum`` on a GPU."""
    if payload.is_cuda:
        return device_checksum(payload)
    return xxhash.xxh3_64_intdigest(payload.numpy().data)


def device_checksum(payload: Tensor) -> int:
    """Sum of 8-byte words times odd numbers that differ by place, modulo 2**64, in torch.

    Any flipped bit changes it, since an odd factor has an inverse; so does a word that moved, but
    for accidents. Both ends of a link have their payload in the same kind of memory.
    """
    words = torch.nn.functional.pad(payload, (0, -payload.numel() % 8)).view(torch.int64)
    factors = torch.arange(words.numel(), device=payload.device) * _FACTOR_STEP + 1
    return int((words * factors).sum()) % 2**64


def as_tensor(raw: bytes) -> Tensor:
    """A writable uint8 tensor with a copy of ``raw``."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0).byte()


def as_bytes(tensor: Tensor) -> bytes:
    """A copy of a uint8 tensor's bytes."""
    return tensor.numpy().tobytes()


def _digest(incarnation: str) -> bytes:
    return hashlib.blake2b(incarnation.encode(), digest_size=8).digest()

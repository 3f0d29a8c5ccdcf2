import dataclasses
import struct

import pytest
import xxhash

from antiphon.errors import LayoutMismatchError, SegmentRejectedError
from antiphon.workers.handoff.segment import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Epochs,
    Header,
    Kind,
    as_bytes,
    as_tensor,
    checksum,
)
from antiphon.workers.handoff.wire import WireFormat

HEADER = Header(Kind.DATA, Epochs.of("prefill-1", "decode-1"), b"t" * 16, 5, 9, 4096, 2**64 - 1)
WIRE = WireFormat("model-a", ((3, 64, 64),) * 30, "float32")


def test_a_header_survives_the_wire():
    raw = HEADER.pack()
    assert len(raw) == HEADER_BYTES
    assert Header.unpack(raw) == HEADER


def test_any_flipped_bit_is_found():
    raw = HEADER.pack()
    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SegmentRejectedError, match="header checksum"):
            Header.unpack(bytes(damaged))


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [(0, b"XXXX", "magic"), (4, b"\x09\x00", "version"), (6, b"\x09\x00", "kind")],
)
def test_a_foreign_header_is_refused_by_field(offset, value, field):
    body = bytearray(HEADER.pack()[:-8])
    body[offset : offset + len(value)] = value
    raw = bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body)))
    with pytest.raises(SegmentRejectedError, match=field):
        Header.unpack(raw)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"start": 10}, "token range"), ({"num_payload_bytes": MAX_PAYLOAD_BYTES + 1}, "payload")],
)
def test_an_impossible_header_is_refused_by_field(change, field):
    with pytest.raises(SegmentRejectedError, match=field):
        Header.unpack(dataclasses.replace(HEADER, **change).pack())


def test_payloads_round_trip_and_have_checksums():
    payload = as_tensor(b"some bytes")
    assert as_bytes(payload) == b"some bytes"
    before = checksum(payload)
    payload[3] += 1
    assert checksum(payload) != before
    assert as_bytes(as_tensor(b"")) == b""


def test_equal_formats_agree():
    same = WireFormat("model-a", ((3, 64, 64),) * 30, "float32")
    WIRE.check_peer(same.describe(), "the receiver")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "b"}, 'model fingerprint is "model-a" here and "b" there'),
        ({"dtype": "bfloat16"}, 'wire dtype is "float32" here and "bfloat16" there'),
        ({"layers": ((3, 64, 64),) * 29}, "number of layers is 30 here and 29 there"),
        ({"layers": ((3, 64, 32),) * 30}, "layers .KV heads, K width, V width. is"),
    ],
)
def test_a_mismatch_names_what_differs(change, message):
    other = dataclasses.replace(WIRE, **change)
    with pytest.raises(LayoutMismatchError, match=message):
        WIRE.check_peer(other.describe(), "the receiver")


def test_an_unreadable_format_is_refused():
    with pytest.raises(LayoutMismatchError, match="no readable wire format"):
        WIRE.check_peer(b"\xff", "the sender")

"""A link begins with both ends agreeing, or with both saying by name why they do not."""

import struct
import threading

import pytest
import torch
import xxhash
from handoff_pair import WIRE, Pair

from antiphon.errors import HandoffError, LayoutMismatchError
from antiphon.workers.handoff import handshake, segment
from antiphon.workers.handoff.segment import HEADER_BYTES, HEADER_VERSION, Epochs
from antiphon.workers.handoff.transport import Link
from antiphon.workers.handoff.wire import WireFormat

EPOCHS = Epochs.of("prefill-1", "decode-1")
CHANGES = [
    (WireFormat("model-b", WIRE.layers, WIRE.dtype), 'model fingerprint is "model-'),
    (WireFormat(WIRE.model_fingerprint, WIRE.layers * 2, WIRE.dtype), "number of layers is"),
    (WireFormat(WIRE.model_fingerprint, ((2, 3, 3),), WIRE.dtype), "layers .KV heads, K width"),
    (WireFormat(WIRE.model_fingerprint, WIRE.layers, "bfloat16"), 'wire dtype is "'),
]


@pytest.mark.parametrize(("wire", "named"), CHANGES, ids=["model", "layers", "shape", "dtype"])
def test_each_difference_is_refused_by_name_at_both_ends(transports, wire, named):
    pair = Pair(*transports, sender_wire=wire)
    pair.transfer([1], [1], 0, 4)
    for error in (pair.next_completed()[2], pair.next_done()[1]):
        assert isinstance(error, LayoutMismatchError)
        assert named.replace(".", "(") in str(error)
    assert not pair.target.slots.any()
    pair.close()


class _OtherVersion(Link):
    """A link whose end speaks a later version of the header."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def start_send(self, tensors):
        (hello,) = tensors
        raw = bytearray(hello.numpy().tobytes())
        struct.pack_into("<H", raw, 4, HEADER_VERSION + 1)
        body = bytes(raw[: HEADER_BYTES - 8])
        struct.pack_into("<Q", raw, HEADER_BYTES - 8, xxhash.xxh3_64_intdigest(body))
        return self._link.start_send([torch.frombuffer(raw, dtype=torch.uint8)])

    def start_recv(self, tensor):
        return self._link.start_recv(tensor)

    def close(self):
        self._link.close()


def _greet_both(transports, wrap_sender, wrap_receiver) -> list[HandoffError | None]:
    errors: list[HandoffError | None] = [None, None]
    links: list[Link] = []
    connecting, accepting = transports
    address = accepting.address

    def run(index: int, join, speak, wrap) -> None:
        link = join()
        links.append(link)
        try:
            speak(wrap(link), WIRE, EPOCHS, 5.0)
            if (speak, wrap) == (handshake.greet, _OtherVersion):
                link.close()  # as it does on seeing this version
        except HandoffError as error:
            errors[index] = error
            link.close()

    threads = [
        threading.Thread(
            target=run,
            args=(0, lambda: connecting.connect(address, "l", 5), handshake.greet, wrap_sender),
        ),
        threading.Thread(
            target=run,
            args=(1, lambda: accepting.accept("l", 5), handshake.answer, wrap_receiver),
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()
    for link in links:
        link.close()
    return errors


def _same(link: Link) -> Link:
    return link


def test_another_version_of_the_sender_is_refused_by_name(transports):
    _, of_receiver = _greet_both(transports, _OtherVersion, _same)
    assert isinstance(of_receiver, LayoutMismatchError)
    assert f"the sender speaks version {HEADER_VERSION + 1}" in str(of_receiver)
    assert f"this worker version {HEADER_VERSION}" in str(of_receiver)


def test_another_version_of_the_receiver_is_refused_by_name(transports):
    of_sender, _ = _greet_both(transports, _same, _OtherVersion)
    assert isinstance(of_sender, LayoutMismatchError)
    assert f"the receiver speaks version {HEADER_VERSION + 1}" in str(of_sender)


def test_equal_ends_agree(transports):
    assert _greet_both(transports, _same, _same) == [None, None]


def test_what_is_no_header_has_no_version():
    assert segment.peer_version(bytes(HEADER_BYTES)) is None

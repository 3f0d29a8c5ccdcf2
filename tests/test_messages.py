"""Messages that arrive as they were sent."""

import msgspec
import pytest

from antiphon.block_hash import BlockHash
from antiphon.messages import (
    Abort,
    Hello,
    LinkOffer,
    Load,
    Prefill,
    PrefillDone,
    PrefillPeer,
    PrefillPool,
    Prewarm,
    Refused,
    RequestOutput,
    Role,
    SamplingParams,
    StepOutput,
    Submit,
    Telemetry,
    TraceContext,
    Welcome,
    WorkerCard,
    decode_client_message,
    decode_worker_message,
    encode,
)
from antiphon.request_timing import FailedPrefill, RemotePrefill, RequestTiming

CARD = WorkerCard(
    "r", "i", Role.DECODE, "ws://h:1/session", "f", 16, 9, 100, 46_080, 23_040, 7, "n"
)
REMOTE = RemotePrefill("p", 0.5, 0.25, 0.125, 16, 48)
TIMING = RequestTiming("remote", 0.25, remote=REMOTE, failed=(FailedPrefill("q", "busy", 0.5),))
OFFER = LinkOffer("h:2", "l", "i")
LOAD = Load(1, 2, 3, 4, 5.5, 0.25)
CLIENT_MESSAGES = [
    Hello(1, "ingress-1", True),
    Submit("r", [1, 2], SamplingParams(5)),
    Submit("r", [0], SamplingParams(1, 0.0, 0.5, 3, -(2**63), (2, 7)), (PrefillPeer("u", "i"),)),
    Submit("r", [1], SamplingParams(5), (), TraceContext("x", "00-ab-cd-01", "vendor=x")),
    Prefill("ab" * 16, [1, 2**32 - 1], 1, OFFER),
    Prefill("ab" * 16, [1], 0, OFFER, TraceContext("x")),
    PrefillPool((PrefillPeer("u", "i"), PrefillPeer("v", "j", "r", "key"))),
    Prewarm(OFFER),
    Abort("r"),
]
WORKER_MESSAGES = [
    Welcome(CARD),
    Refused("r", "busy", "full"),
    StepOutput([]),
    StepOutput(
        [
            RequestOutput("a", [1]),
            RequestOutput("b", [2, 3], "stop", 16, TIMING),
        ]
    ),
    PrefillDone(2**40, 0.25),
    Telemetry(3, True, [BlockHash(b"\0" * 16)], [BlockHash(b"\xff" * 16)], LOAD),
]


@pytest.mark.parametrize("message", CLIENT_MESSAGES, ids=repr)
def test_client_messages_round_trip(message):
    assert decode_client_message(encode(message)) == message


@pytest.mark.parametrize("message", WORKER_MESSAGES, ids=repr)
def test_worker_messages_round_trip(message):
    decoded = decode_worker_message(encode(message))
    assert decoded == message
    assert type(decoded) is type(message)


def test_every_kind_of_message_is_covered():
    def kinds(decode) -> set[type]:
        return set(decode.__self__.type.__args__)

    assert {type(message) for message in CLIENT_MESSAGES} == kinds(decode_client_message)
    assert {type(message) for message in WORKER_MESSAGES} == kinds(decode_worker_message)


def test_a_role_arrives_as_a_role():
    welcome = decode_worker_message(encode(Welcome(CARD)))
    assert welcome.card.role is Role.DECODE


def test_neither_side_takes_the_other_sides_messages():
    with pytest.raises(msgspec.ValidationError):
        decode_worker_message(encode(Abort("r")))
    with pytest.raises(msgspec.ValidationError):
        decode_client_message(encode(Welcome(CARD)))


@pytest.mark.parametrize("raw", [b"", b"\xc1", encode(Abort("r"))[:-1], encode({"type": "Abort"})])
def test_what_is_not_a_message_is_refused(raw):
    with pytest.raises(msgspec.MsgspecError):
        decode_client_message(raw)


def test_a_later_release_may_add_fields():
    known = msgspec.to_builtins(Abort("r"))
    assert decode_client_message(encode({**known, "added_later": 1})) == Abort("r")

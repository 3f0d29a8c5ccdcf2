"""Block hashes that chain, and messages that arrive as they were sent."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.messages import (
    Abort,
    BlockHash,
    FailedPrefill,
    Hello,
    LinkOffer,
    Load,
    Prefill,
    PrefillDone,
    PrefillPeer,
    PrefillPool,
    Prewarm,
    Refused,
    RemotePrefill,
    RequestOutput,
    RequestTiming,
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
    hash_blocks,
)

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
BLOCK_SIZES = st.integers(1, 9)

CARD = WorkerCard(
    "r", "i", Role.DECODE, "ws://h:1/session", "f", 16, 9, 100, 46_080, 23_040, 7, "n"
)
REMOTE = RemotePrefill("p", 0.5, 0.25, 0.125, 16, 48)
TIMING = RequestTiming("remote", 0.25, remote=REMOTE, failed=(FailedPrefill("q", "busy", 0.5),))
OFFER = LinkOffer("gloo", "h:2", "l", "i", "w")
LOAD = Load(1, 2, 3, 4, 5.5, 0.25)
CLIENT_MESSAGES = [
    Hello(1, "ingress-1", True),
    Submit("r", [1, 2], SamplingParams(5)),
    Submit("r", [0], SamplingParams(1, 0.0, 0.5, 3, -(2**63), (2, 7)), (PrefillPeer("u", "i"),)),
    Submit("r", [1], SamplingParams(5), (), TraceContext("x", "00-ab-cd-01", "vendor=x")),
    Prefill("r", "ab" * 16, [1, 2**32 - 1], 1, OFFER),
    Prefill("r", "ab" * 16, [1], 0, OFFER, TraceContext("x")),
    PrefillPool((PrefillPeer("u", "i"), PrefillPeer("v", "j", "r", "key"))),
    Prewarm(OFFER),
    Abort("r"),
]
WORKER_MESSAGES = [
    Welcome(CARD),
    Refused("r", "busy", "full", 2.5),
    StepOutput([]),
    StepOutput(
        [
            RequestOutput("a", [1]),
            RequestOutput("b", [2, 3], "stop", 16, TIMING),
        ]
    ),
    PrefillDone("r", 16, 2**40, 0.5, 0.25),
    Telemetry(3, True, [BlockHash(b"\0" * 16)], [BlockHash(b"\xff" * 16)], LOAD),
]


@given(TOKENS, BLOCK_SIZES)
def test_only_full_blocks_have_hashes(tokens, block_size):
    hashes = hash_blocks(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    assert all(len(block_hash) == 16 for block_hash in hashes)


@given(TOKENS, TOKENS, BLOCK_SIZES)
def test_equal_hashes_are_equal_prefixes(left, right, block_size):
    pairs = zip(hash_blocks(left, block_size), hash_blocks(right, block_size), strict=False)
    for index, (one, other) in enumerate(pairs, start=1):
        end = index * block_size
        assert (one == other) == (left[:end] == right[:end])


@given(TOKENS, BLOCK_SIZES, st.integers(0, 8))
def test_a_chain_goes_on_from_its_last_hash(tokens, block_size, num_blocks):
    hashes = hash_blocks(tokens, block_size)
    cut = min(num_blocks, len(hashes))
    parent = hashes[cut - 1] if cut else b""
    assert hashes[:cut] + hash_blocks(tokens[cut * block_size :], block_size, parent) == hashes


@given(st.lists(st.integers(0, 9), min_size=8, max_size=20))
def test_a_changed_token_changes_its_block_and_all_after_it(tokens):
    before = hash_blocks(tokens, 4)
    changed = [*tokens[:5], tokens[5] + 1, *tokens[6:]]
    after = hash_blocks(changed, 4)
    assert after[0] == before[0]
    assert not set(after[1:]) & set(before[1:])


def test_block_size_and_salt_separate_chains():
    tokens = list(range(8))
    assert not set(hash_blocks(tokens, 4)) & set(hash_blocks(tokens, 2))
    assert not set(hash_blocks(tokens, 4, b"a")) & set(hash_blocks(tokens, 4, b"b"))


def test_hashes_are_the_same_in_every_process_and_release():
    # Prefill, decode and ingress compare them; a change makes every cached prefix a miss.
    first, second = hash_blocks([1, 2, 3, 4], 2)
    assert (first.hex(), second.hex()) == (
        "2cc5e4d47c5f3c5fbe635a5a5b7bb392",
        "66ca1890a7b0edaee5b40586c64fbba2",
    )


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_id_is_refused(token):
    with pytest.raises(OverflowError):
        hash_blocks([token], 1)


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

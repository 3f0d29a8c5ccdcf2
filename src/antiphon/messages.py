"""What the processes say to each other: the messages of a worker session.

A *session* is one WebSocket between a client (an ingress, or a decode worker that asks for
prefills) and a worker. Its first two messages are ``Hello`` and ``Welcome``; after that either side
speaks when it has something to say. Requests belong to the session they came over: when it ends,
the worker aborts them and frees their blocks.

    client                                   worker
    (the handshake carries the worker's key: ``workers.session_key``)
    Hello            ->                      (refuses another protocol version by closing)
                     <-                      Welcome(card)
                     <-                      Telemetry(snapshot), then deltas without a gap
    PrefillPool | Prewarm ->                 (no answer)
    Submit | Prefill ->
                     <-                      StepOutput* with a final finish_reason, or Refused
                                             (Prefill: PrefillDone or Refused)
    Abort            ->
"""

from enum import StrEnum
from typing import Any

import msgspec

from antiphon.block_hash import BlockHash
from antiphon.request_timing import RequestTiming

PROTOCOL_VERSION = 5
MAX_PREFILL_CANDIDATES = 3  # of one request


class Role(StrEnum):
    """What a worker does when a prompt is done: send its KV, or sample."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


class SamplingParams(msgspec.Struct, frozen=True):
    """How output tokens are chosen and when they stop."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    seed: int = 0  # with the position, the only randomness of a draw
    stop_token_ids: tuple[int, ...] = ()


class WorkerCard(msgspec.Struct, frozen=True):
    """Who a worker is; constant for one incarnation."""

    replica_id: str
    incarnation: str  # fresh at every start: a restarted worker is a stranger
    role: Role
    url: str  # ws://host:port/session
    model_fingerprint: str
    block_size: int
    num_blocks: int
    max_context_tokens: int
    kv_bytes_per_token: int  # in the cache
    wire_bytes_per_token: int  # in a hand-off
    pid: int
    node: str
    session_key: str = ""  # opens sessions with it
    start_seconds: float = 0.0  # that its start took; 0: not known
    caches_prefixes: bool = True  # what it has computed is found by later prompts
    max_waiting_requests: int = 256  # further ones it refuses

    def public(self) -> dict[str, Any]:
        """What anybody may know of a worker: all but its key."""
        fields = msgspec.structs.asdict(self)
        del fields["session_key"]
        return fields


class Load(msgspec.Struct, frozen=True):
    """How busy a worker is now."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_queued_tokens: int  # prompt tokens that are yet to be computed
    prefill_tokens_per_second: float  # measured; 0 before the first step
    decode_step_seconds: float  # measured; 0 before the first step
    is_draining: bool = False  # it takes nothing new and will stop
    num_streams: int = 0  # requests that sample, from their arrival to their last token
    num_decoding: int = 0  # of those, the ones that get a token in every step
    decode_base_seconds: float = 0.0  # of a step without prompt tokens; 0 before the first
    decode_stream_seconds: float = 0.0  # what each stream adds to it
    prompt_gap_seconds: float = 0.0  # a step of those, at least one, and all prompt it may have
    prompt_gap_tokens: int = 0  # how much prompt that is
    prompt_share: float = 0.0  # of the last seconds, spent on prompt tokens


# client -> worker


class Hello(_Message, frozen=True):
    """Open a session."""

    protocol_version: int
    client_id: str
    wants_telemetry: bool


class PrefillPeer(msgspec.Struct, frozen=True):
    """A prefill worker that a decode worker may ask."""

    url: str
    incarnation: str
    replica_id: str = ""  # for people; empty where nobody knows it
    session_key: str = ""  # as in its card

    @classmethod
    def of(cls, card: WorkerCard) -> "PrefillPeer":
        """The peer that a card describes."""
        return cls(card.url, card.incarnation, card.replica_id, card.session_key)

    @property
    def name(self) -> str:
        """For people."""
        return self.replica_id or self.url


class TraceContext(msgspec.Struct, frozen=True):
    """What a span of another process begins below (W3C Trace Context)."""

    request_id: str  # of the HTTP request, as its client knows it
    traceparent: str = ""
    tracestate: str = ""


class Submit(_Message, frozen=True):
    """Generate from a prompt on a decode or colocated worker."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    prefill: tuple[PrefillPeer, ...] = ()  # whom to ask, best first; empty: compute it here
    trace: TraceContext | None = None  # of a request that is sampled


class LinkOffer(msgspec.Struct, frozen=True):
    """How a sender reaches the receiver that offers the link."""

    address: str  # of the rendezvous, host:port
    link_id: str  # fresh for every pair and every rebuild
    receiver_incarnation: str
    segment_bytes: int = 4 << 20  # the largest payload that the receiver takes
    receiver_name: str = ""  # replica id, for people


class Prefill(_Message, frozen=True):
    """Compute KV for ``prompt_token_ids`` and send that of tokens ``first_token`` onwards."""

    request_id: str  # of the transfer: 32 hex digits, fresh for every attempt
    prompt_token_ids: list[int]  # without the prompt's last token, which decode computes
    first_token: int
    link: LinkOffer
    trace: TraceContext | None = None  # of a request that is sampled
    wanted_by: str = ""  # the request's id on the decode worker, for logs


class PrefillPool(_Message, frozen=True):
    """The prefill workers that a decode worker may be told to ask; replaces the last one."""

    peers: tuple[PrefillPeer, ...]  # newest last


class Prewarm(_Message, frozen=True):
    """Make a link now; prefills over it will follow, or not."""

    link: LinkOffer


class Abort(_Message, frozen=True):
    """Stop a request; aborting an unknown or finished one is harmless."""

    request_id: str


ClientMessage = Hello | PrefillPool | Submit | Prewarm | Prefill | Abort


# worker -> client


class RefusalKind(StrEnum):
    """What a client may do about a refusal; fit for a metric's label."""

    BUSY = "busy"  # not taken for want of room: ask another, or later
    DRAINING = "draining"  # not taken because the worker will stop: ask another
    MOVED = "moved"  # taken, and given back by a worker that stops: go on elsewhere
    INVALID = "invalid"  # no worker like this one can take it
    FAILED = "failed"  # the engine failed
    LINK_BROKEN = "link_broken"  # of a transfer: the link to this client failed


class Welcome(_Message, frozen=True):
    """Answer to ``Hello``."""

    card: WorkerCard


class Refused(_Message, frozen=True):
    """A request was not taken, or cannot be finished here; outputs sent before stay valid."""

    request_id: str
    kind: RefusalKind
    reason: str


class RequestOutput(msgspec.Struct, frozen=True):
    """New tokens of one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" or "length" with the last tokens
    num_cached_tokens: int = 0  # of the prompt, found in a prefix cache of this worker
    timing: RequestTiming | None = None  # with the first token


class StepOutput(_Message, frozen=True):
    """What one engine step produced for the requests of one session."""

    outputs: list[RequestOutput]


class PrefillDone(_Message, frozen=True):
    """All segments of a transfer have crossed the link: what that says of its speed."""

    num_sent_bytes: int
    send_seconds: float  # in which the link was busy with them


class Telemetry(_Message, frozen=True):
    """What changed on a worker; a gap in ``sequence`` voids the subscriber's view.

    A snapshot carries every cached block in ``stored`` and replaces what was known.
    """

    sequence: int
    is_snapshot: bool
    stored: list[BlockHash]
    removed: list[BlockHash]
    load: Load


WorkerMessage = Welcome | Refused | StepOutput | PrefillDone | Telemetry

encode = msgspec.msgpack.Encoder().encode
decode_client_message = msgspec.msgpack.Decoder(ClientMessage).decode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode

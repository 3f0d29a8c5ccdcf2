"""Where the time to a request's first token went on its decode worker.

Only durations travel, because clocks of nodes differ: each process says how long it had the
request, and the one that asked takes the rest.
"""

import msgspec


class RemotePrefill(msgspec.Struct, frozen=True):
    """How a prefill worker came to the KV that it sent, seconds by its own clock."""

    worker: str  # replica id, or url where that is not known
    queue: float  # from the message's arrival to the first step with tokens of the prompt
    compute: float  # from there to the end of the last such step
    send: float  # from the first segment to all KV being in place, most of it beside computing
    num_cached_tokens: int  # of the prompt, found in its prefix cache
    num_sent_tokens: int  # whose KV crossed


class FailedPrefill(msgspec.Struct, frozen=True):
    """A prefill worker that was asked and did not deliver all."""

    worker: str  # replica id, or url where that is not known
    outcome: str  # as in antiphon_prefill_attempts_total
    seconds: float


class RequestTiming(msgspec.Struct, frozen=True):
    """Seconds; one part begins where the one before it ends, so nothing lies between them.

    queue           from the request's arrival until its blocks were reserved
    prefill_queue   until somebody began to compute what the prompt lacked; failed attempts
                    and the way to a prefill worker are in it
    prefill         until the last of it was computed; computed here, with the first token
    transfer        until the rest of the KV had come: what the hand-off adds to computing
    decode_queue    until the step began that gives the first token
    first_step      that step
    """

    prefill_path: str  # "local", "remote" or "fallback"
    queue: float = 0.0
    prefill_queue: float = 0.0
    prefill: float = 0.0
    transfer: float = 0.0
    decode_queue: float = 0.0
    first_step: float = 0.0
    remote: RemotePrefill | None = None  # where the path is "remote"
    failed: tuple[FailedPrefill, ...] = ()  # in the order in which they were asked

    @property
    def total(self) -> float:
        """From the request's arrival at the decode worker to its first token."""
        computed = self.queue + self.prefill_queue + self.prefill
        return computed + self.transfer + self.decode_queue + self.first_step

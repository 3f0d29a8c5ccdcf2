"""Which faults there are, where and when they can strike, and what must come of each.

One request is followed through the steps of its hand-off. At one of them one of three parties gets
one fault. The party ``link`` is whatever carries that step: at ``ask`` the session between the two
workers, at ``decode`` the session with the ingress, and between those the link that carries KV.

    ask        decode is about to reserve blocks, or prefill was asked and has computed nothing
    handshake  the link is made, and the first message on it is about to go
    first      the first segment is about to go
    middle     a later one is
    end        all segments have gone, the word that this was all has not
    decode     the first token has left, the second is about to be computed

What must come of it, where another worker of each kind is there; in every case the client then gets
exactly what ``generate()`` gives:

    remote     the prefill worker that was asked delivers, and nothing is counted as failed
    again      the hand-off fails, is counted, and another prefill worker delivers
    moved      the request is lost with its decode worker, is counted, and goes on at another one

Where there is no other one, ``again`` ends in the decode worker computing what is missing, and
``moved`` in an error.

A dot means that there is no such case, because

    - workers neither drop, double, swap nor damage what they send: only what lies between them does
    - sessions are WebSockets over TCP, which hides drops, doubles, swaps and damage or breaks
    - a handshake waits for its answer, so nothing can overtake it; an END has no payload
    - the prefill worker reads nothing during a hand-off but the answer in the handshake, so only
      decode can be a slow reader; at ``ask`` it reads nothing either, and at ``decode`` the reader
      is the client, whose slowness no worker waits for (tests/deployment/test_openai_http.py)
    - a session that carries nothing any more is found by its pings, which takes seconds: see
      test_processes.py, where workers are stopped
"""

import enum
from dataclasses import dataclass

_TABLE = """
                         ask     handshake  first   middle  end     decode

prefill kill             again   again      again   again   again   remote
prefill hang             again   again      again   again   again   remote
prefill delay            remote  remote     remote  remote  remote  remote

decode  kill             moved   moved      moved   moved   moved   moved
decode  hang             remote  again      again   again   again   remote
decode  delay            remote  remote     remote  remote  remote  remote
decode  slow_reader      .       remote     remote  remote  remote  .

link    kill             again   again      again   again   again   moved
link    hang             again   again      again   again   again   .
link    delay            remote  remote     remote  remote  remote  remote
link    drop             .       again      again   again   again   .
link    duplicate        .       remote     remote  remote  remote  .
link    reorder          .       .          again   again   again   .
link    corrupt_header   .       again      again   again   again   .
link    corrupt_payload  .       again      again   again   .       .
"""

# How the receiver counts what came over the link, where it says more than that the link broke.
_DISCARDED = {
    ("duplicate", "handshake"): "unknown_transfer",  # a greeting belongs to no transfer
    ("duplicate", "first"): "duplicate",
    ("duplicate", "middle"): "duplicate",
    ("duplicate", "end"): "unknown_transfer",  # the transfer has ended by then
    ("drop", "first"): "range",
    ("drop", "middle"): "range",
    ("reorder", "first"): "range",
    ("reorder", "middle"): "range",
    ("reorder", "end"): "range",
    ("corrupt_payload", "first"): "checksum",
    ("corrupt_payload", "middle"): "checksum",
}

# As what the decode worker counts the failed attempt. A header that can't be trusted makes the
# receiver break the link, and the sender's word of that may come before its own verdict.
_FAILURES = {
    "kill": {"lost"},
    "hang": {"stalled"},
    "drop": {"rejected"},
    "reorder": {"rejected"},
    "corrupt_header": {"rejected", "lost"},
    "corrupt_payload": {"rejected"},
    ("corrupt_payload", "handshake"): {"rejected", "lost"},
}


class Party(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    LINK = "link"


class Kind(enum.StrEnum):
    KILL = "kill"
    HANG = "hang"  # until the client has its answer; then it goes on, as a ghost
    DELAY = "delay"
    DROP = "drop"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    CORRUPT_HEADER = "corrupt_header"
    CORRUPT_PAYLOAD = "corrupt_payload"
    SLOW_READER = "slow_reader"


class Step(enum.IntEnum):
    ASK = 0
    HANDSHAKE = 1
    FIRST = 2
    MIDDLE = 3
    END = 4
    DECODE = 5


@dataclass(frozen=True)
class Cell:
    """One fault at one step, and what must come of it."""

    party: Party
    kind: Kind
    step: Step
    outcome: str

    def __str__(self) -> str:
        return f"{self.party}-{self.kind}-{self.step.name.lower()}"

    @property
    def times_out(self) -> bool:
        """Whether only a time-out can notice it."""
        is_silent = self.kind is Kind.HANG or (
            self.kind is Kind.DROP and self.step in (Step.HANDSHAKE, Step.END)
        )
        return self.outcome == "again" and is_silent

    @property
    def failures(self) -> set[str]:
        """The outcomes that a failed attempt may be counted under; none where none may fail."""
        if self.outcome != "again":
            return set()
        if self.times_out:
            return {"stalled"}
        place = (self.kind.value, self.step.name.lower())
        return _FAILURES.get(place) or _FAILURES[self.kind.value]

    @property
    def discarded(self) -> str | None:
        """Under what the receiver must have counted a message that it threw away."""
        return _DISCARDED.get((self.kind.value, self.step.name.lower()))


def all_cells() -> list[Cell]:
    """The table, read."""
    steps, *rows = [line.split() for line in _TABLE.splitlines() if line.strip()]
    assert [Step[step.upper()] for step in steps] == list(Step)
    return [
        Cell(Party(party), Kind(kind), Step(number), outcome)
        for party, kind, *outcomes in rows
        for number, outcome in enumerate(outcomes)
        if outcome != "."
    ]


def diagonal(first: int) -> list[Cell]:
    """One cell of every row; each at a later step than the row above's, round and round."""
    rows: dict[tuple[Party, Kind], list[Cell]] = {}
    for cell in all_cells():
        rows.setdefault((cell.party, cell.kind), []).append(cell)
    return [cells[(first + i) % len(cells)] for i, cells in enumerate(rows.values())]

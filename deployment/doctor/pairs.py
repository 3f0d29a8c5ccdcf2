"""In which order links between many nodes are measured, so that none disturbs another."""

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.deployment.doctor.facts import Node


@dataclass(frozen=True, slots=True)
class Pair:
    """Ends of a link to measure."""

    transport: str
    sender: str
    receiver: str


def diagonals(senders: Sequence[Node], receivers: Sequence[Node]) -> list[tuple[Node, Node]]:
    """Every pair, ordered so that neighbours in the list have different ends."""
    if not senders or not receivers:
        return []
    length = max(len(senders), len(receivers))
    steps = [(index, shift) for shift in range(length) for index in range(length)]
    found = {
        (index % len(senders), (index + shift) % len(receivers)): None for index, shift in steps
    }
    return [(senders[i], receivers[j]) for i, j in found]


def rounds(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Divide pairs into rounds in which no node occurs twice."""
    divided: list[list[Pair]] = []
    left = list(pairs)
    while left:
        busy: set[str] = set()
        now, later = [], []
        for pair in left:
            if busy.isdisjoint((pair.sender, pair.receiver)):
                busy |= {pair.sender, pair.receiver}
                now.append(pair)
            else:
                later.append(pair)
        divided.append(now)
        left = later
    return divided

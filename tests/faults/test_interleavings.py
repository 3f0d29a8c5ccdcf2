"""Random programs on random schedules: senders, receiver and links, one thread at a time.

A program is what happens to the ends from outside: transfers are opened, computed, finished, given
up and cancelled, links break, are given up and make room for others, segments get lost, doubled,
swapped and damaged, ends restart and lose each other, time passes. A schedule decides at each lock,
wait and copy which thread goes on. Both come from Hypothesis, so a failure is repeated and made
small. What must hold is in ``handoff_world``.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from handoff_world import MAX_BLOCKS, World
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_transport import Fault
from stepped_threads import stepped
from torch import Tensor
from turns import Choose

from antiphon.errors import HandoffError
from antiphon.workers.handoff.endpoint import SegmentTarget
from antiphon.workers.handoff.incoming import Incoming
from antiphon.workers.handoff.link_table import LinkTable
from antiphon.workers.handoff.receiver_link import ReceiverLink
from antiphon.workers.handoff.segment import Header
from antiphon.workers.handoff.sender import HandoffSender
from antiphon.workers.handoff.sender_link import SenderLink

Action = tuple[str, int, int]
HARMLESS = ("open", "open", "push", "push", "push", "finish", "pass turns")
WATCHFUL = ("await read", "await write")
HARMFUL = (
    "abort",
    "cancel",
    "cancel",
    "retire",
    "broke",
    "receiver leaves",
    "sender leaves",
    "break link",
    "restart sender",
    "restart receiver",
    "stall read",
    "stall write",
    "prewarm",
)
FAULTS = [fault for fault in Fault if fault is not Fault.HOLD]  # any send may take any time anyway


def programs(*kinds: str) -> st.SearchStrategy[list[Action]]:
    action = st.tuples(st.sampled_from(kinds), st.integers(0, 7), st.integers(1, 12))
    return st.lists(action, min_size=3, max_size=25)


def schedules() -> st.SearchStrategy["Schedule"]:
    return st.builds(Schedule, st.integers(0, 2**32), st.sampled_from([0.02, 0.1, 0.3, 0.9]))


@dataclass(frozen=True)
class Schedule:
    """Lets a thread go on, and now and then another one instead."""

    seed: int
    switch_rate: float

    def choices(self) -> Choose:
        rng = random.Random(self.seed)

        def choose(num_able: int) -> int:
            return rng.randrange(num_able) if rng.random() < self.switch_rate else 0

        return choose


def play(world: World, program: Sequence[Action]) -> None:
    for kind, which, amount in program:
        for _ in range(which if kind in HARMLESS else 0):
            world.turns.pause()
        picked = world.pick(which)
        match kind:
            case "open":
                if opened := world.open(amount, 1 + which % MAX_BLOCKS, amount // 3):
                    world.push(opened, amount)
            case "pass turns":
                for _ in range(10 * amount):
                    world.turns.pause()
            case "await read":  # so that what comes next gets in the middle of it
                world.turns.catch(lambda: world.source.reading_for is not None, amount)
            case "await write":
                world.turns.catch(lambda: world.target.writing_for is not None, amount)
            case "stall read":
                world.source.stall_seconds = amount
            case "stall write":
                world.target.stall_seconds = amount
            case "prewarm":
                world.prewarm(which)
            case "pass time":
                world.turns.sleep(amount / 2)
            case "retire":
                world.retire(which)
            case "broke":
                world.broke(which)
            case "receiver leaves":
                world.receiver_leaves(which)
            case "sender leaves":
                world.sender_leaves(which)
            case "break link":
                world.break_link(which)
            case "restart sender":
                world.restart_sender(which)
            case "restart receiver":
                world.restart_receiver()
            case "push" if picked:
                world.push(picked, amount)
            case "finish" if picked:
                world.finish(picked)
            case "abort" if picked:
                world.abort(picked)
            case "cancel" if picked:
                world.cancel(picked)
            case _:
                pass  # nothing is open that it could be done to


def explore(schedule: Schedule, program: Sequence[Action], faults: dict[int, Fault]) -> World:
    with stepped(schedule.choices(), "antiphon.workers.handoff", "memory_transport") as turns:
        world = World(turns, faults)
        play(world, program)
        world.settle()
        return world


@settings(max_examples=1000, deadline=None)
@given(
    schedule=schedules(),
    program=programs(*HARMLESS, *HARMFUL, *WATCHFUL, "pass time"),
    faults=st.dictionaries(st.integers(0, 30), st.sampled_from(FAULTS), max_size=3),
)
def test_whatever_happens_blocks_stay_right_and_every_transfer_ends_once(
    schedule: Schedule, program: list[Action], faults: dict[int, Fault]
) -> None:
    explore(schedule, program, faults)


@settings(max_examples=300, deadline=None)
@given(schedule=schedules(), program=programs(*HARMLESS))
def test_what_nobody_disturbs_arrives(schedule: Schedule, program: list[Action]) -> None:
    world = explore(schedule, program, {})
    for transfer in world.transfers:
        assert (transfer.error is None) == (transfer.num_pushed == transfer.end), transfer


def _fence_without_lock(self: Incoming) -> bool:
    was_live, self._is_live = self._is_live, False
    return was_live


def _take_when_dead(
    self: Incoming, header: Header, payload: Tensor, target: SegmentTarget
) -> str | None:
    with self._lock:
        self._check(header, target.checksum(payload), target.num_bytes_per_token)
        target.scatter(self._block_table, header.start, header.end, payload)
        self._next = header.end
        return None


def _done_before_the_link_let_go(self: HandoffSender, transfer_id: str, reason: str) -> None:
    with self._lock:
        link = self._transfers.pop(transfer_id, None)
        ended = link is not None and link.transfers.pop(transfer_id)
    if ended:
        self._on_done(transfer_id, HandoffError(reason), 0, 0.0)


def _kept_though_idle(self: LinkTable, link: ReceiverLink) -> bool:
    self._current.pop(link.peer_incarnation, None)
    return False


def _left_only_if_idle(self: HandoffSender, receiver_incarnation: str) -> list[SenderLink]:
    idle = [key for key, link in self._links.items() if link.is_idle]
    return [self._links.pop(key) for key in idle]


@pytest.mark.parametrize(
    ("owner", "method", "bug", "kind"),
    [
        (Incoming, "fence", _fence_without_lock, "cancel"),
        (Incoming, "take", _take_when_dead, "cancel"),
        (Incoming, "_check", lambda *_: None, "open"),
        (Incoming, "check_end", lambda *_: None, "open"),
        (HandoffSender, "abort", _done_before_the_link_let_go, "abort"),
        (LinkTable, "retire", _kept_though_idle, "retire"),
        (HandoffSender, "_let_go", _left_only_if_idle, "retire"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_search_finds_bugs_that_are_planted(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, bug: Callable[..., object], kind: str
) -> None:
    monkeypatch.setattr(owner, method, bug)
    rng = random.Random(0)
    kinds = [*HARMLESS, *HARMFUL, *WATCHFUL, *[kind] * 3]
    assert any(_goes_wrong(seed, rng, kinds) for seed in range(1000))


def _goes_wrong(seed: int, rng: random.Random, kinds: list[str]) -> bool:
    program = [(rng.choice(kinds), rng.randrange(8), rng.randint(1, 12)) for _ in range(20)]
    try:
        explore(Schedule(seed, 0.3), program, {rng.randrange(20): rng.choice(FAULTS)})
    except AssertionError:
        return True
    return False

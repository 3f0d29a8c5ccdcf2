"""What an ingress knows about the workers: who they are, how busy, and which blocks they cache.

    join(card) ──▶ joined ──apply(snapshot)──▶ ready ──apply(delta)──▶ ready
                     │                           │
                     └──── leave, gap in sequence, new incarnation of the replica ────▶ gone

A view is either without a gap or gone: after a gap nobody can tell which blocks are still cached.
Workers are known by incarnation, never by replica id, so nothing that an earlier life of a replica
said can be held against, or credited to, the next. A worker is offered to the policy from its first
snapshot on, until it says that it is draining.

A delta carries net changes; ``removed`` is applied before ``stored``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from antiphon.errors import TelemetryGapError
from antiphon.messages import Load, Role, Telemetry, WorkerCard
from antiphon.router.assumed_rates import MeasuredRates, assume
from antiphon.router.prefix_index import PrefixIndex
from antiphon.router.prompt import HashedPrompt, hash_prompt

# Between two looks at all workers' rates. A worker has worked this long before its peers that have
# not are believed to be like it.
_ASSUME_SECONDS = 0.1


@dataclass(slots=True, eq=False)
class WorkerView:
    """One incarnation of a worker, as of its last telemetry."""

    card: WorkerCard
    load: Load
    sequence: int
    updated_at: float  # on the caller's clock
    rates: MeasuredRates = field(init=False)
    believed: Load = field(init=False)  # the load, with what is assumed of its rates

    def __post_init__(self) -> None:
        self.rates = MeasuredRates(self.load, self.updated_at, self.updated_at)
        self.believed = self.load

    def report(self, telemetry: Telemetry, now: float) -> None:
        """Take in a report."""
        self.load, self.sequence, self.updated_at = telemetry.load, telemetry.sequence, now
        self.believed = self.rates.report(telemetry.load, now)

    def age_seconds(self, now: float) -> float:
        """Time since the load was reported."""
        return now - self.updated_at


@dataclass(frozen=True, slots=True)
class CachedBlocks:
    """Leading blocks of one prompt in the workers' caches, by incarnation; 0 is left out."""

    confirmed: dict[str, int]  # reported
    expected: dict[str, int]  # reported, or computed by then because of prompts on their way


class ClusterView:
    """Every worker that this process has a session with. Not thread-safe.

    Args:
        expected_ttl_seconds: How long blocks of prompts on their way count as cached.
    """

    def __init__(self, expected_ttl_seconds: float = 10.0) -> None:
        self._expected_ttl_seconds = expected_ttl_seconds
        self._cards: dict[str, WorkerCard] = {}
        self._views: dict[str, WorkerView] = {}
        self._indexes: dict[int, PrefixIndex] = {}  # by block size: hashes differ
        self._assumed_at = -math.inf
        self.prefill_workers: tuple[WorkerView, ...] = ()
        self.decode_workers: tuple[WorkerView, ...] = ()  # decode and colocated

    @property
    def cards(self) -> dict[str, WorkerCard]:
        """The joined workers by incarnation, ready or not."""
        return dict(self._cards)

    def get(self, incarnation: str) -> WorkerView | None:
        """Return a ready worker's view."""
        return self._views.get(incarnation)

    def join(self, card: WorkerCard) -> None:
        """Enter a worker; what was known of this replica before is forgotten."""
        for incarnation, known in list(self._cards.items()):
            if known.replica_id == card.replica_id:
                self.leave(incarnation)
        self._cards[card.incarnation] = card

    def leave(self, incarnation: str) -> None:
        """Forget a worker; an unknown one is ignored."""
        card = self._cards.pop(incarnation, None)
        if card is None:
            return
        self._views.pop(incarnation, None)
        if index := self._indexes.get(card.block_size):
            index.drop(incarnation)
        if all(other.block_size != card.block_size for other in self._cards.values()):
            self._indexes.pop(card.block_size, None)
        self._group_by_role()

    def apply(self, incarnation: str, telemetry: Telemetry, now: float) -> None:
        """Take in one telemetry message.

        Raises:
            TelemetryGapError: A message is missing before this one, or the worker was replaced;
                the worker has left this view. Close its session and open another one.
        """
        view = self._views.get(incarnation)
        if telemetry.is_snapshot and incarnation in self._cards:
            self._index_of(incarnation).drop(incarnation)
        elif view is None or telemetry.sequence != view.sequence + 1:
            self.leave(incarnation)
            expected = "a snapshot" if view is None else f"message {view.sequence + 1}"
            raise TelemetryGapError(
                f"telemetry of worker {incarnation}: expected {expected}, "
                f"got message {telemetry.sequence}; its view was dropped"
            )
        index = self._index_of(incarnation)
        index.remove(incarnation, telemetry.removed)
        index.add(incarnation, telemetry.stored)
        self._record_load(incarnation, telemetry, now)

    def hash_prompt(
        self, token_ids: Sequence[int], known: HashedPrompt | None = None
    ) -> HashedPrompt:
        """Hash a prompt for every block size that a worker here uses.

        Args:
            token_ids: At least one.
            known: The same prompt, hashed before; returned unless another block size has come.
        """
        if known is not None and known.hashes.keys() >= self._indexes.keys():
            return known
        return hash_prompt(token_ids, self._indexes)

    def match(self, prompt: HashedPrompt, now: float) -> CachedBlocks:
        """Look up which workers cache how much of a prompt."""
        found = CachedBlocks({}, {})
        for block_size, index in self._indexes.items():
            index.expire(now)
            hashes = prompt.hashes.get(block_size, ())  # a pool that came after the hashing
            expected = index.match(hashes)
            found.expected.update(expected)
            found.confirmed.update(index.confirmed_part(hashes, expected))
        return found

    def expect(self, card: WorkerCard, prompt: HashedPrompt, num_tokens: int, now: float) -> None:
        """Count the first ``num_tokens`` of a prompt on its way as cached on a worker soon.

        Not on one that keeps nothing for later prompts.
        """
        if card.caches_prefixes and card.incarnation in self._views:
            hashes = prompt.hashes.get(card.block_size, ())
            self._index_of(card.incarnation).speculate(
                card.incarnation, hashes[: num_tokens // card.block_size], now
            )

    def assume_rates(self, now: float) -> None:
        """Keep what is believed of the workers' rates up to date; cheap if called often."""
        if now - self._assumed_at < _ASSUME_SECONDS:
            return
        self._assumed_at = now
        for role in Role:
            assume([v.rates for v in self._views.values() if v.card.role is role], now)
        for view in self._views.values():
            view.believed = view.rates.believed()

    def num_indexed_blocks(self, incarnation: str) -> int:
        """Blocks that a worker reported and still caches."""
        card = self._cards.get(incarnation)
        index = self._indexes.get(card.block_size) if card else None
        return index.num_confirmed(incarnation) if index else 0

    @property
    def views(self) -> tuple[WorkerView, ...]:
        """Every ready worker, draining ones too."""
        return tuple(self._views.values())

    def check(self) -> None:
        """Assert the invariants (for tests)."""
        assert self._views.keys() <= self._cards.keys()
        replica_ids = [card.replica_id for card in self._cards.values()]
        assert len(replica_ids) == len(set(replica_ids)), "a replica has two incarnations"
        usable = {view for view in self._views.values() if not view.load.is_draining}
        assert {*self.prefill_workers, *self.decode_workers} == usable
        for index in self._indexes.values():
            index.check()

    def _index_of(self, incarnation: str) -> PrefixIndex:
        block_size = self._cards[incarnation].block_size
        index = self._indexes.get(block_size)
        if index is None:
            index = self._indexes[block_size] = PrefixIndex(self._expected_ttl_seconds)
        return index

    def _record_load(self, incarnation: str, telemetry: Telemetry, now: float) -> None:
        view = self._views.get(incarnation)
        if view is None:
            card = self._cards[incarnation]
            self._views[incarnation] = WorkerView(card, telemetry.load, telemetry.sequence, now)
            self._group_by_role()
        else:
            drains = telemetry.load.is_draining != view.load.is_draining
            view.report(telemetry, now)
            if drains:
                self._group_by_role()

    def _group_by_role(self) -> None:
        views = [view for view in self._views.values() if not view.load.is_draining]
        self.prefill_workers = tuple(v for v in views if v.card.role is Role.PREFILL)
        self.decode_workers = tuple(v for v in views if v.card.role is not Role.PREFILL)

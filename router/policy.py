"""Which workers serve a prompt: the least predicted time to the first token.

Candidates, for each decode worker D and the best prefill worker P:

    pair (P, D)   D is a decode worker, lacks some of the prompt, and there is a P
    D alone       D is colocated; or there is no P; or D lacks few tokens

P's share of a prediction is the same for every D, so P is chosen once and a decision costs
O(P + D), not O(P x D). Among near-equal D the one with fewest streams wins, then the one that
caches most. Among near-equal P it is the other way round: to wait for a prefix that is being
computed takes as long as to compute it again elsewhere, but is less work. Then they take turns.

What D caches counts only as reported, because D asks for, or computes, whatever is not there when
the prompt arrives. A worker that computes prompts does so in order, so there the blocks of prompts
on their way count too.

    choose ──▶ on_sent ──▶ on_first_token ──▶ on_finished      (on_finished in every case)
"""

import heapq
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

from antiphon.config import RouterConfig
from antiphon.errors import NoWorkerError
from antiphon.messages import MAX_PREFILL_CANDIDATES, Load, Role, WorkerCard
from antiphon.router.cost_model import CostModel, CostParameters
from antiphon.router.decision import Decision, Reason
from antiphon.router.prompt import HashedPrompt
from antiphon.router.sent_work import SentItem, SentWork, WorkerLedger
from antiphon.router.telemetry_view import CachedBlocks, ClusterView, WorkerView


class _Option(NamedTuple):
    score: float  # seconds, with charges
    num_streams: int
    num_cached_tokens: int
    seconds: float
    worker: WorkerView
    reason: Reason


# Rating every worker is the inner loop of a decision: there, options are plain tuples, and enum
# members and the larger of two numbers are had without a call (a microsecond per worker in all).
_RatedTuple = tuple[float, int, int, float, WorkerView, Reason]
_REMOTE = Reason.REMOTE
_DECODE = Role.DECODE
_COLOCATED = Role.COLOCATED
_NOTHING_SENT = WorkerLedger(0.0)  # stays empty: what is sent gets a ledger of its own


class Policy:
    """Chooses workers, and remembers what it sent where. One per ingress; not thread-safe."""

    def __init__(self, config: RouterConfig, parameters: CostParameters | None = None) -> None:
        self._config = config
        self._model = CostModel(
            parameters or CostParameters(link_bytes_per_second=config.link_bytes_per_second)
        )
        self._sent = SentWork()
        self._num_decisions = 0

    def choose(
        self,
        view: ClusterView,
        prompt: HashedPrompt,
        now: float,
        exclude: frozenset[str] = frozenset(),
    ) -> Decision:
        """Choose the workers for a prompt; changes nothing but the turn.

        Args:
            view: The workers; expired expectations are taken out of it.
            prompt: From ``view.hash_prompt``.
            now: On the clock of the view's ``apply``.
            exclude: Incarnations that have failed or refused this request already.

        Raises:
            NoWorkerError: No decode or colocated worker is left.
        """
        cached = view.match(prompt, now)
        self._num_decisions += 1
        prefills = self._rate_prefills(view.prefill_workers, prompt, cached, exclude)
        prefill = self._pick(prefills, _least_work) if prefills else None
        options = [
            self._rate_decode(worker, prompt, cached, prefill)
            for worker in view.decode_workers
            if worker.card.incarnation not in exclude
        ]
        if not options:
            raise NoWorkerError(_explain_no_worker(view))
        decode = self._pick(options, _least_crowded)
        pair = prefill if decode.reason is _REMOTE else None
        return Decision(
            decision_id=self._num_decisions,
            decode=decode.worker.card,
            prefill=pair.worker.card if pair else None,
            predicted_ttft_seconds=decode.seconds,
            num_cached_tokens_decode=decode.num_cached_tokens,
            num_cached_tokens_prefill=pair.num_cached_tokens if pair else 0,
            reason=decode.reason,
            decided_at=now,
            prompt=prompt,
            alternates=_alternates(prefills, pair) if pair else (),
        )

    def on_sent(self, view: ClusterView, decision: Decision) -> None:
        """Record that a request was sent as decided; ``on_finished`` must follow."""
        prompt, decode, prefill = decision.prompt, decision.decode, decision.prefill
        num_missing = prompt.num_kv_tokens - decision.num_cached_tokens_decode
        num_blocks = _num_blocks(prompt, decode, decision.num_cached_tokens_decode)
        item = SentItem(decision.decided_at, 0 if prefill else num_missing, num_blocks)
        self._sent.add(decode.incarnation, decision.decision_id, item)
        view.expect(decode, prompt, prompt.num_tokens, decision.decided_at)
        if prefill:
            num_tokens = prompt.num_kv_tokens - decision.num_cached_tokens_prefill
            item = SentItem(decision.decided_at, num_tokens, 0)
            self._sent.add(prefill.incarnation, decision.decision_id, item)
            view.expect(prefill, prompt, prompt.num_kv_tokens, decision.decided_at)

    def on_first_token(self, decision: Decision) -> None:
        """Record that the prompt has been computed."""
        self._sent.see(decision.decode.incarnation, decision.decision_id)
        if decision.prefill:
            self._sent.remove(decision.prefill.incarnation, decision.decision_id)

    def on_finished(self, decision: Decision) -> None:
        """Record that the attempt is over, however it ended."""
        self._sent.remove(decision.decode.incarnation, decision.decision_id)
        if decision.prefill:
            self._sent.remove(decision.prefill.incarnation, decision.decision_id)

    def num_outstanding(self, incarnation: str) -> int:
        """Requests of this router that a worker is busy with."""
        ledger = self._sent.of(incarnation)
        return ledger.num_outstanding if ledger else 0

    def _rate_prefills(
        self,
        workers: Sequence[WorkerView],
        prompt: HashedPrompt,
        cached: CachedBlocks,
        exclude: frozenset[str],
    ) -> list[_RatedTuple]:
        return [
            self._rate_prefill(worker, prompt, cached)
            for worker in workers
            if worker.card.incarnation not in exclude
        ]

    def _rate_prefill(
        self, worker: WorkerView, prompt: HashedPrompt, cached: CachedBlocks
    ) -> _RatedTuple:
        load, ledger = worker.load, self._ledger_of(worker)
        num_kv_tokens = prompt.num_tokens - 1
        num_cached = _num_cached_tokens(cached.expected, worker.card, num_kv_tokens)
        num_queued = load.num_queued_tokens + ledger.num_unseen_prefill_tokens
        seconds = self._model.prefill_seconds(load, num_queued, num_kv_tokens - num_cached)
        return seconds, _num_streams(load, ledger), num_cached, seconds, worker, _REMOTE

    def _rate_decode(
        self,
        worker: WorkerView,
        prompt: HashedPrompt,
        cached: CachedBlocks,
        prefill: _Option | None,
    ) -> _RatedTuple:
        """Rate the better of computing the prompt on a decode worker and of having it sent."""
        card, load, ledger = worker.card, worker.load, self._ledger_of(worker)
        num_kv_tokens = prompt.num_tokens - 1
        num_cached = _num_cached_tokens(cached.confirmed, card, num_kv_tokens)
        num_missing = num_kv_tokens - num_cached
        num_streams = _num_streams(load, ledger)
        wait = self._model.wait_seconds(load, num_streams)
        num_free = load.num_free_blocks - ledger.num_unseen_blocks
        room = self._model.room_seconds(num_free, _num_blocks(prompt, card, num_cached))
        pair = local = None
        if prefill is not None and num_missing and card.role is _DECODE:
            handoff = self._model.handoff_seconds(num_missing, card.wire_bytes_per_token)
            seconds = prefill.seconds + handoff + wait
            pair = (seconds + room, num_streams, num_cached, seconds, worker, _REMOTE)
        if reason := self._reason_for_local(card, num_missing, prefill):
            num_cached = _num_cached_tokens(cached.expected, card, num_kv_tokens)
            seconds, charge = self._local_seconds(load, ledger, num_kv_tokens - num_cached)
            seconds += wait
            local = (seconds + charge + room, num_streams, num_cached, seconds, worker, reason)
        if pair is None or local is None:
            rated = pair or local
            assert rated is not None  # a worker that gets no pair has a reason for local
            return rated
        return local if local[0] <= pair[0] else pair

    def _reason_for_local(
        self, card: WorkerCard, num_missing_tokens: int, prefill: _Option | None
    ) -> Reason | None:
        if card.role is _COLOCATED:
            return Reason.COLOCATED
        if prefill is None:
            return Reason.NO_PREFILL
        if num_missing_tokens <= self._config.local_prefill_max_tokens:
            return Reason.SHORT
        return None

    def _local_seconds(
        self, load: Load, ledger: WorkerLedger, num_tokens: int
    ) -> tuple[float, float]:
        """Return predicted seconds of the prompt on a decode worker, and the charge for it."""
        num_queued = load.num_queued_tokens + ledger.num_unseen_prefill_tokens
        seconds = self._model.prefill_seconds(load, num_queued, num_tokens)
        return seconds, self._model.stall_seconds(load, num_tokens)

    def _ledger_of(self, worker: WorkerView) -> WorkerLedger:
        ledger = self._sent.of(worker.card.incarnation)
        if ledger is None:
            return _NOTHING_SENT
        ledger.settle(worker.updated_at)
        return ledger

    def _pick(
        self, options: list[_RatedTuple], preference: Callable[[_RatedTuple], tuple[int, int]]
    ) -> _Option:
        limit = min(option[0] for option in options) * (1 + self._model.parameters.tie_ratio)
        near = [option for option in options if option[0] <= limit]
        turn = self._num_decisions % len(near)
        best = min(near[turn:] + near[:turn], key=preference)
        return _Option._make(best)


def _alternates(options: list[_RatedTuple], chosen: _Option) -> tuple[WorkerCard, ...]:
    """The next best prefill workers, which the decode worker asks if the chosen one fails."""
    others = (option for option in options if option[4] is not chosen.worker)
    best = heapq.nsmallest(MAX_PREFILL_CANDIDATES - 1, others, key=itemgetter(0))
    return tuple(option[4].card for option in best)


def _least_work(option: _RatedTuple) -> tuple[int, int]:
    return -option[2], option[1]


def _least_crowded(option: _RatedTuple) -> tuple[int, int]:
    return option[1], -option[2]


def _num_streams(load: Load, ledger: WorkerLedger) -> int:
    """Requests on a worker: as reported and sent since, and never fewer than this router's own."""
    reported = load.num_running + load.num_waiting + ledger.num_unseen
    outstanding = ledger.num_outstanding
    return reported if reported > outstanding else outstanding


def _num_cached_tokens(found: dict[str, int], card: WorkerCard, num_kv_tokens: int) -> int:
    """Tokens of a prompt that need no computing on a worker; the last one is never among them."""
    num_tokens = found.get(card.incarnation, 0) * card.block_size
    return num_tokens if num_tokens < num_kv_tokens else num_kv_tokens


def _num_blocks(prompt: HashedPrompt, card: WorkerCard, num_cached_tokens: int) -> int:
    """Blocks that the prompt and its first output token still need on a worker."""
    return -(-(prompt.num_tokens + 1 - num_cached_tokens) // card.block_size)


def _explain_no_worker(view: ClusterView) -> str:
    if not view.decode_workers:
        return "no decode or colocated worker is connected; wait for one to start, or add replicas"
    return f"all {len(view.decode_workers)} decode and colocated workers failed or refused"

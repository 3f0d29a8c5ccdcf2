"""Which workers serve a prompt: the least predicted time to the first token, as ``rating`` sees it.

P's share of a prediction is the same for every D, so P is chosen once and a decision costs
O(P + D), not O(P x D). Among near-equal D the one with fewest streams wins, then the one that
caches most. Among near-equal P it is the other way round: to wait for a prefix that is being
computed takes as long as to compute it again elsewhere, but is less work. Then they take turns.

Where targets are set and the choice would strain them, one worker may take the request alone:
``targets`` compares, ``target_cost_model`` predicts.

    choose ──▶ on_sent ──▶ on_first_token ──▶ on_finished      (on_finished in every case)
"""

import heapq
from collections.abc import Callable, Sequence
from operator import itemgetter

from antiphon.config import RouterConfig
from antiphon.errors import NoWorkerError
from antiphon.messages import MAX_PREFILL_CANDIDATES, Role, WorkerCard
from antiphon.router.cost_model import CostParameters
from antiphon.router.decision import Decision, Reason
from antiphon.router.prompt import HashedPrompt
from antiphon.router.rating import Option, RatedTuple, Rating, lacks_room, num_blocks
from antiphon.router.sent_work import SentItem, SentWork
from antiphon.router.targets import Targets
from antiphon.router.telemetry_view import CachedBlocks, ClusterView, WorkerView


class Policy:
    """Chooses workers, and remembers what it sent where. One per ingress; not thread-safe."""

    def __init__(self, config: RouterConfig, parameters: CostParameters | None = None) -> None:
        parameters = parameters or CostParameters(
            link_bytes_per_second=config.link_bytes_per_second
        )
        self._tie_ratio = parameters.tie_ratio
        self._targets = Targets(config)
        self._sent = SentWork()
        self._rating = Rating(config, parameters, self._sent)
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
        decodes = [w for w in view.decode_workers if w.card.incarnation not in exclude]
        if not decodes:
            # Before anything that costs: who waits for a worker asks again every few milliseconds.
            raise NoWorkerError(_explain_no_worker(view))
        view.assume_rates(now)
        cached = view.match(prompt, now)
        self._num_decisions += 1
        prefills = self._rate_prefills(view.prefill_workers, prompt, cached, exclude)
        prefill = self._pick(prefills, _least_work) if prefills else None
        options = [self._rating.decode(worker, prompt, cached, prefill) for worker in decodes]
        decode = self._pick(options, _least_crowded)
        if self._targets.are_set:
            decode = self._keep_targets(decode, view, prompt, cached, prefill, exclude)
        pair = prefill if decode.reason is Reason.REMOTE else None
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
        num_needed = num_blocks(prompt, decode, decision.num_cached_tokens_decode)
        item = SentItem(decision.decided_at, 0 if prefill else num_missing, num_needed, True)
        self._sent.add(decode.incarnation, decision.decision_id, item)
        if not prefill:
            view.expect(decode, prompt, prompt.num_tokens, decision.decided_at)
        else:
            num_tokens = prompt.num_kv_tokens - decision.num_cached_tokens_prefill
            # The decode worker asks between two of its steps; without targets they are short.
            worker = view.get(decode.incarnation) if self._targets.are_set else None
            asked_at = decision.decided_at + (self._rating.gap_seconds(worker) if worker else 0.0)
            item = SentItem(asked_at, num_tokens, 0)
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
    ) -> list[RatedTuple]:
        num_tokens = prompt.num_kv_tokens
        return [
            self._rating.prefill(worker, prompt, cached)
            for worker in workers
            if worker.card.incarnation not in exclude
            and worker.card.max_context_tokens >= num_tokens
        ]

    def _keep_targets(
        self,
        chosen: Option,
        view: ClusterView,
        prompt: HashedPrompt,
        cached: CachedBlocks,
        prefill: Option | None,
        exclude: frozenset[str],
    ) -> Option:
        """Return another choice if ``chosen`` strains a target that the other one keeps better.

        Nobody leaves a worker with room for one without: how long that takes is a guess.
        """
        steps = chosen.worker.believed
        predicted = self._rating.predict(chosen, prompt, steps)
        if self._targets.are_safe(predicted):
            return chosen
        others = []
        for worker in view.decode_workers:
            if worker.card.incarnation not in exclude:
                others.append(self._rating.decode(worker, prompt, cached, prefill))
                if worker.card.role is Role.DECODE and prefill is not None:
                    others.append(self._rating.alone(worker, prompt, cached, Reason.DECODE_ALONE))
        prefill_workers = view.prefill_workers if self._targets.let_prefill_generate else ()
        for worker in prefill_workers:
            if worker.card.incarnation not in exclude and _holds(worker, chosen):
                others.append(self._rating.alone(worker, prompt, cached, Reason.PREFILL_ALONE))
        if not lacks_room(chosen):
            others = [other for other in others if not lacks_room(other)]
        predictions = [self._rating.predict(other, prompt, steps) for other in others]
        index = self._targets.better(predicted, predictions)
        return chosen if index is None else Option._make(others[index])

    def _pick(
        self, options: list[RatedTuple], preference: Callable[[RatedTuple], tuple[int, int]]
    ) -> Option:
        limit = min(option[0] for option in options) * (1 + self._tie_ratio)
        near = [option for option in options if option[0] <= limit]
        turn = self._num_decisions % len(near)
        best = min(near[turn:] + near[:turn], key=preference)
        return Option._make(best)


def _holds(worker: WorkerView, chosen: Option) -> bool:
    """Whether a worker takes as long a context: how long an output gets is not known here."""
    return worker.card.max_context_tokens >= chosen.worker.card.max_context_tokens


def _alternates(options: list[RatedTuple], chosen: Option) -> tuple[WorkerCard, ...]:
    """The next best prefill workers, which the decode worker asks if the chosen one fails."""
    others = (option for option in options if option[4] is not chosen.worker)
    best = heapq.nsmallest(MAX_PREFILL_CANDIDATES - 1, others, key=itemgetter(0))
    return tuple(option[4].card for option in best)


def _least_work(option: RatedTuple) -> tuple[int, int]:
    return -option[2], option[1]


def _least_crowded(option: RatedTuple) -> tuple[int, int]:
    return option[1], -option[2]


def _explain_no_worker(view: ClusterView) -> str:
    if not view.decode_workers:
        return "no decode or colocated worker is connected; wait for one to start, or add replicas"
    return f"all {len(view.decode_workers)} decode and colocated workers failed or refused"

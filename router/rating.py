"""What each worker would take for a prompt, from its last report and what was sent there since.

    pair (P, D)   D is a decode worker, lacks some of the prompt, and there is a P
    D alone       D is colocated; or there is no P; or D lacks few tokens
    any alone     where targets ask for it; a prefill worker only under one between tokens

What a decode worker caches counts only as reported where a pair is rated, because it asks for
whatever is not there when the prompt arrives. Where prompts are computed, what they share is
computed once, even if they come together (``workers.prompt_chunks``): there the blocks of those on
their way to be computed count too.
"""

from typing import NamedTuple

from msgspec.structs import replace

from antiphon.config import RouterConfig
from antiphon.messages import Load, Role, WorkerCard
from antiphon.router.cost_model import CostModel, CostParameters
from antiphon.router.decision import Reason
from antiphon.router.prompt import HashedPrompt
from antiphon.router.sent_work import SentWork, WorkerLedger
from antiphon.router.target_cost_model import TargetCostModel
from antiphon.router.targets import Predicted
from antiphon.router.telemetry_view import CachedBlocks, WorkerView


class Option(NamedTuple):
    score: float  # seconds, with charges
    num_streams: int
    num_cached_tokens: int
    seconds: float
    worker: WorkerView
    reason: Reason


# Rating every worker is the inner loop of a decision: there, options are plain tuples, and enum
# members and the larger of two numbers are had without a call (a microsecond per worker in all).
RatedTuple = tuple[float, int, int, float, WorkerView, Reason]
_REMOTE = Reason.REMOTE
_DECODE = Role.DECODE
_COLOCATED = Role.COLOCATED
_NOTHING_SENT = WorkerLedger(0.0)  # stays empty: what is sent gets a ledger of its own


class Rating:
    """Rates workers for prompts.

    Args:
        config: Of the router; with targets, predictions are those of ``TargetCostModel``.
        parameters: Constants of the predictions.
        sent: What the router sent; read here, never written.
    """

    def __init__(self, config: RouterConfig, parameters: CostParameters, sent: SentWork) -> None:
        self._config = config
        self._sent = sent
        self._target_model = TargetCostModel(parameters, config.target_itl_seconds)
        has_targets = (config.target_ttft_seconds or config.target_itl_seconds) is not None
        self._model = self._target_model if has_targets else CostModel(parameters)

    def prefill(self, worker: WorkerView, prompt: HashedPrompt, cached: CachedBlocks) -> RatedTuple:
        load, ledger = worker.believed, self._ledger_of(worker)
        num_kv_tokens = prompt.num_tokens - 1
        num_cached = _num_cached_tokens(cached.expected, worker.card, num_kv_tokens)
        num_queued = load.num_queued_tokens + ledger.num_unseen_prefill_tokens
        seconds = self._model.prefill_seconds(load, num_queued, num_kv_tokens - num_cached)
        return seconds, _num_requests(load, ledger), num_cached, seconds, worker, _REMOTE

    def decode(
        self,
        worker: WorkerView,
        prompt: HashedPrompt,
        cached: CachedBlocks,
        prefill: Option | None,
    ) -> RatedTuple:
        """Rate the better of computing the prompt on a decode worker and of having it sent."""
        card = worker.card
        num_cached = _num_cached_tokens(cached.confirmed, card, prompt.num_tokens - 1)
        num_missing = prompt.num_tokens - 1 - num_cached
        pair = local = None
        if prefill is not None and num_missing and card.role is _DECODE:
            pair = self._pair(worker, prompt, num_cached, prefill)
        if reason := self._reason_for_local(card, num_missing, prefill):
            local = self.alone(worker, prompt, cached, reason)
        if pair is None or local is None:
            rated = pair or local
            assert rated is not None  # a worker that gets no pair has a reason for local
            return rated
        return local if local[0] <= pair[0] else pair

    def _pair(
        self, worker: WorkerView, prompt: HashedPrompt, num_cached: int, prefill: Option
    ) -> RatedTuple:
        card, load, ledger = worker.card, worker.believed, self._ledger_of(worker)
        num_streams = _num_requests(load, ledger)
        room = self._model.room_seconds(load, ledger.num_unseen_blocks, num_blocks(prompt, card))
        num_missing = prompt.num_tokens - 1 - num_cached
        handoff = self._model.handoff_seconds(num_missing, card.wire_bytes_per_token)
        seconds = prefill.seconds + handoff + self._model.wait_seconds(load, num_streams)
        return seconds + room, num_streams, num_cached, seconds, worker, _REMOTE

    def alone(
        self, worker: WorkerView, prompt: HashedPrompt, cached: CachedBlocks, reason: Reason
    ) -> RatedTuple:
        """Rate computing a prompt where it is decoded, whatever the worker's role."""
        card, load, ledger = worker.card, worker.believed, self._ledger_of(worker)
        num_streams = _num_requests(load, ledger)
        room = self._model.room_seconds(load, ledger.num_unseen_blocks, num_blocks(prompt, card))
        num_cached = _num_cached_tokens(cached.expected, card, prompt.num_tokens - 1)
        num_tokens = prompt.num_tokens - 1 - num_cached
        num_queued = load.num_queued_tokens + ledger.num_unseen_prefill_tokens
        seconds = self._model.prefill_seconds(load, num_queued, num_tokens)
        seconds += self._model.wait_seconds(load, num_streams)
        charge = self._model.stall_seconds(load, num_tokens)
        return seconds + charge + room, num_streams, num_cached, seconds, worker, reason

    def predict(self, option: Option | RatedTuple, prompt: HashedPrompt, like: Load) -> Predicted:
        """Predict what a choice gives, to the request and to streams beside it.

        Args:
            option: Rated for ``prompt``.
            prompt: Computed on the worker that decodes, unless the option is a pair.
            like: Whose steps to assume of a worker that has not decoded yet.
        """
        score, _, num_cached, _, worker, reason = option
        load = worker.believed
        if not load.decode_base_seconds:
            load = replace(
                load,
                decode_base_seconds=like.decode_base_seconds,
                decode_stream_seconds=like.decode_stream_seconds,
            )
        ledger = self._ledger_of(worker)
        num_tokens = load.num_queued_tokens + ledger.num_unseen_prefill_tokens
        if reason is not _REMOTE:
            num_tokens += prompt.num_tokens - 1 - num_cached
        num_streams = _num_generating(load, ledger) + 1
        itl = self._target_model.at_stake_seconds(worker.card, load, num_streams, num_tokens)
        return Predicted(score, itl)  # with targets, a lack of room is the only charge in it

    def _reason_for_local(
        self, card: WorkerCard, num_missing_tokens: int, prefill: Option | None
    ) -> Reason | None:
        if card.role is _COLOCATED:
            return Reason.COLOCATED
        if prefill is None:
            return Reason.NO_PREFILL
        if num_missing_tokens <= self._config.local_prefill_max_tokens:
            return Reason.SHORT
        return None

    def _ledger_of(self, worker: WorkerView) -> WorkerLedger:
        ledger = self._sent.of(worker.card.incarnation)
        if ledger is None:
            return _NOTHING_SENT
        if ledger.num_unseen:
            load = worker.load
            ledger.settle(worker.updated_at, load.num_running + load.num_waiting)
        return ledger

    def gap_seconds(self, worker: WorkerView) -> float:
        """How long a decode worker's step keeps it from asking a prefill worker."""
        load = worker.believed
        num_tokens = load.num_queued_tokens
        return self._target_model.intertoken_seconds(
            worker.card, load, load.num_streams, num_tokens
        )


def _num_requests(load: Load, ledger: WorkerLedger) -> int:
    """Requests on a worker: as reported and sent since, and never fewer than this router's own."""
    reported = load.num_running + load.num_waiting + ledger.num_unseen
    outstanding = ledger.num_outstanding
    return reported if reported > outstanding else outstanding


def _num_generating(load: Load, ledger: WorkerLedger) -> int:
    """The same of requests that sample there; on a prefill worker others are not sampled."""
    reported = load.num_streams + ledger.num_unseen_streams
    return reported if reported > ledger.num_streams else ledger.num_streams


def _num_cached_tokens(found: dict[str, int], card: WorkerCard, num_kv_tokens: int) -> int:
    """Tokens of a prompt that need no computing on a worker; the last one is never among them."""
    num_tokens = found.get(card.incarnation, 0) * card.block_size
    if num_tokens <= num_kv_tokens:
        return num_tokens
    return num_kv_tokens - num_kv_tokens % card.block_size  # whole blocks are found, or none


def num_blocks(prompt: HashedPrompt, card: WorkerCard, num_cached_tokens: int = 0) -> int:
    """Blocks of a prompt and its first output token on a worker, but for the cached ones."""
    return -(-(prompt.num_tokens + 1 - num_cached_tokens) // card.block_size)


def lacks_room(option: Option | RatedTuple) -> bool:
    """Whether streams have to end before a worker takes a prompt that was rated with targets."""
    return option[0] > option[3]

"""When a client that was answered 503 should come again: the one place that says so.

    a worker that decodes    until the earliest has admitted and computed what waits there, by its
                             telemetry and the cost model that the router chooses with
    none, one is listed      until its session is back, or Serve has found that it is dead
    none at all              until a replacement runs: as long as the last worker took to start
    the endpoint stops       until it has stopped; before that nobody takes anything
    the ingress is full      until enough of its requests have ended, at their pace of late

An outage that outlasts what was expected of it is taken to last as long again: nobody knows why it
lasts. Clients get whole seconds between two bounds.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

from antiphon.errors import CapacityError, ServiceStoppingError
from antiphon.messages import Role, WorkerCard
from antiphon.router.cost_model import CostModel, CostParameters
from antiphon.router.telemetry_view import ClusterView, WorkerView

# A client that comes sooner asks a telemetry that is hardly newer; one that stays away for longer
# misses what operators do meanwhile, and OpenAI's own clients heed no more than a minute.
_BOUNDS_SECONDS = (1, 60)
# Serve asks replicas for their health every 5 s; a session that broke is made anew within 2 s.
_HEALTH_CHECK_SECONDS = 5.0
# What a start takes before the worker's own code runs: a health check, and a process of Ray's.
_PLACEMENT_SECONDS = 10.0
_START_SECONDS = 20.0  # of a worker, while none has said how long it took
_SMOOTHING = 0.2  # weight of the request that ended last


def whole_seconds(seconds: float) -> int:
    """What a Retry-After header says."""
    lowest, highest = _BOUNDS_SECONDS
    return max(lowest, min(highest, math.ceil(seconds)))


class Turnover:
    """How fast a bounded number of slots frees itself."""

    def __init__(self) -> None:
        self._mean_seconds = 0.0

    def ended(self, seconds: float) -> None:
        """Slots are free again after so long."""
        mean = self._mean_seconds
        self._mean_seconds = mean + _SMOOTHING * (seconds - mean) if mean else seconds

    def seconds(self, num_wanted: int, num_held: int) -> float:
        """Until so many of those that are held have ended; 0 before the first one has."""
        return num_wanted * self._mean_seconds / num_held


class RetryAfter:
    """Predicts when a request that got no place would get one. One per ingress.

    Args:
        now: On the clock of all times here; no worker is connected yet.
        parameters: Of the cost model.
    """

    def __init__(self, now: float, parameters: CostParameters | None = None) -> None:
        self._model = CostModel(parameters or CostParameters())
        self._start_seconds = _START_SECONDS
        self._lost_at: float | None = now  # since then no worker has decoded
        self.stops_at: float | None = None  # of an endpoint that is being stopped

    def learn(self, card: WorkerCard) -> None:
        """Take a worker's word for how long a start takes."""
        if card.role is not Role.PREFILL and card.start_seconds:
            self._start_seconds = card.start_seconds

    def observe(self, view: ClusterView, listed: Mapping[str, WorkerCard], now: float) -> None:
        """Note whether anybody decodes; to be called when workers come or go."""
        if any(True for _ in _usable(view, listed)):
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = now

    def seconds(
        self,
        error: CapacityError,
        view: ClusterView,
        listed: Mapping[str, WorkerCard],
        num_prompt_tokens: int,
        now: float,
    ) -> float:
        """Predict when a request that failed with ``error`` should come again.

        Args:
            error: Why it got no place.
            view: The connected workers.
            listed: Those that Serve runs, by incarnation.
            num_prompt_tokens: Of the request.
            now: On the clock of ``observe``.
        """
        if isinstance(error, ServiceStoppingError) and self.stops_at is not None:
            return self.stops_at - now
        self.observe(view, listed, now)
        if self._lost_at is None:
            return self._busy_seconds(view, _usable(view, listed), num_prompt_tokens)
        is_listed = any(_may_decode(card, view) for card in listed.values())
        start_seconds = _PLACEMENT_SECONDS + self._start_seconds
        expected = _HEALTH_CHECK_SECONDS if is_listed else start_seconds
        return abs(expected - (now - self._lost_at))

    def _busy_seconds(
        self, view: ClusterView, workers: Iterable[WorkerView], num_prompt_tokens: int
    ) -> float:
        prefill_queue = min(map(self._queue_seconds, view.prefill_workers), default=None)
        return min(self._place_seconds(w, num_prompt_tokens, prefill_queue) for w in workers)

    def _place_seconds(
        self, worker: WorkerView, num_prompt_tokens: int, prefill_queue: float | None
    ) -> float:
        """Until a worker has a place, and whoever would compute the prompt is through with others.

        The two queues shrink side by side.
        """
        load, card = worker.load, worker.card
        computes_itself = card.role is Role.COLOCATED or prefill_queue is None
        queue = self._queue_seconds(worker) if computes_itself else prefill_queue
        num_needed = -(-(num_prompt_tokens + 1) // card.block_size)
        room = self._model.room_seconds(load, 0, num_needed)
        return max(queue or 0.0, self._model.wait_seconds(load, load.num_running) + room)

    def _queue_seconds(self, worker: WorkerView) -> float:
        return self._model.prefill_seconds(worker.load, worker.load.num_queued_tokens, 0)


def _usable(view: ClusterView, listed: Mapping[str, WorkerCard]) -> Iterator[WorkerView]:
    """Lazy, because most reports only ask whether there is one."""
    return (worker for worker in view.decode_workers if worker.card.incarnation in listed)


def _may_decode(card: WorkerCard, view: ClusterView) -> bool:
    """Whether a listed worker that is not usable now may be again."""
    known = view.get(card.incarnation)
    is_draining = known is not None and known.load.is_draining
    return card.role is not Role.PREFILL and not is_draining

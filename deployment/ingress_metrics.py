"""What an ingress counts: requests and tokens as clients see them, and what the router decided.

Everything is counted on the event loop. A request is counted once, by ``request_ended``; a choice
that came to its end once, by ``choice_ended``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

from antiphon.config import RouterConfig
from antiphon.deployment.journey import Journey
from antiphon.messages import Role
from antiphon.metrics import MICROSECONDS, RATIOS, TOKENS, Metrics
from antiphon.router.decision import Reason

_FINISHED = ("stop", "length")
_CLIENTS_FAULT = ("invalid", "unauthorized", "unknown_model", "context_length", "unsupported")


class IngressMetrics(Metrics):
    """One ingress process's metrics.

    Args:
        targets: Says which latencies are wanted; None: none are.
    """

    def __init__(self, targets: RouterConfig | None = None) -> None:
        super().__init__("ingress")
        self._ttft_target = targets.target_ttft_seconds if targets else None
        self._itl_target = targets.target_itl_seconds if targets else None
        self._make_request_metrics()
        self._make_router_metrics()
        self._make_targets()

    def _make_request_metrics(self) -> None:
        self._requests = self.counter(
            "antiphon_requests",
            "Generation requests over HTTP, by outcome.",
            "outcome",
            values=(*_FINISHED, "aborted", "busy", "failed", *_CLIENTS_FAULT),
        )
        self._unauthorized = self.counter(
            "antiphon_unauthorized",
            "HTTP requests without a valid API key.",
            "reason",
            values=("missing", "unknown"),
        )
        self._key_file_failures = self.counter(
            "antiphon_api_key_file_failures",
            "Looks at the file of API keys that found it changed and of no use.",
        ).labels(self.role)
        self._in_progress = self.gauge(
            "antiphon_requests_in_progress",
            "Generation requests that have come whole and have not ended.",
        ).labels(self.role)
        self._ttft = self.histogram(
            "antiphon_time_to_first_token_seconds",
            "From a request's arrival to a choice's first token leaving, by who computed it.",
            "path",
        )
        self._ttft_parts = self.histogram(
            "antiphon_time_to_first_token_part_seconds",
            "The same, part by part; the parts add up to the whole; only remote has a transfer.",
            "part",
        )
        self._itl = self.histogram(
            "antiphon_inter_token_latency_seconds",
            "Between two tokens of a choice; tokens that leave together share the gap before them.",
        )
        self._tpot = self.histogram(
            "antiphon_time_per_output_token_seconds", "Mean gap between a choice's tokens."
        )
        self._e2e = self.histogram(
            "antiphon_e2e_request_latency_seconds",
            "From a request's arrival to its end, of requests that ended with stop or length.",
        )
        self._prompt_tokens = self.histogram(
            "antiphon_request_prompt_tokens", "Prompt tokens of those requests.", bounds=TOKENS
        )
        self._generation_tokens = self.histogram(
            "antiphon_request_generation_tokens", "Output tokens of the same.", bounds=TOKENS
        )

    def _make_router_metrics(self) -> None:
        self._refusals = self.counter(
            "antiphon_refusals",
            "Times that workers refused a request, by what they said.",
            "reason",
            values=("busy", "draining"),
        )
        self._replays = self.counter(
            "antiphon_replays",
            "Choices whose worker was lost or gave them back, by what became of them.",
            "reason",
            "outcome",
            values=product(("lost", "moved"), ("resumed", "complete", "failed", "aborted")),
        )
        self._decisions = self.counter(
            "antiphon_router_decisions",
            "Requests sent to workers, by why there.",
            "reason",
            values=tuple(Reason),
        )
        self._decision_seconds = self.histogram(
            "antiphon_router_decision_seconds", "To choose workers.", bounds=MICROSECONDS
        )
        self._ttft_ratio = self.histogram(
            "antiphon_router_time_to_first_token_ratio",
            "Time from a router's decision to the first token, over what it had predicted.",
            "reason",
            bounds=RATIOS,
        )
        self._predicted = self.counter(
            "antiphon_router_predicted_time_to_first_token_seconds",
            "Predictions for the decisions that a first token came of, summed.",
            "reason",
        )
        self._actual = self.counter(
            "antiphon_router_actual_time_to_first_token_seconds",
            "From those decisions to the first token, summed.",
            "reason",
        )
        self._sessions_lost = self.counter(
            "antiphon_router_sessions_lost",
            "Sessions that ended while Serve listed the worker.",
            "pool",
            values=tuple(Role),
        )

    def _make_targets(self) -> None:
        has_targets = self._ttft_target is not None or self._itl_target is not None
        self._by_target = self.counter(
            "antiphon_requests_by_target",
            "Choices that ended with stop or length, by the wanted latencies that they met.",
            "met",
            values=("both", "ttft_missed", "itl_missed", "neither") if has_targets else (),
        )
        targets = self.gauge("antiphon_target_seconds", "Wanted latencies.", "target")
        for name, seconds in (("ttft", self._ttft_target), ("itl", self._itl_target)):
            if seconds is not None:
                targets.labels(self.role, name).set(seconds)

    # Requests.

    def unauthorized(self, reason: str) -> None:
        """A request had no valid API key."""
        self._unauthorized.labels(self.role, reason).inc()

    def key_file_failed(self) -> None:
        """The file of API keys has changed, and is of no use."""
        self._key_file_failures.inc()

    @contextmanager
    def request_in_progress(self) -> Iterator[None]:
        """A generation request has come whole; it ends with the block.

        One whose client is still sending it waits for nobody here, however long that takes.
        """
        self._in_progress.inc()
        try:
            yield
        finally:
            self._in_progress.dec()

    def request_ended(self, outcome: str, seconds: float) -> None:
        """One has been answered, or left alone; ``seconds`` since its arrival."""
        self._requests.labels(self.role, outcome).inc()
        if outcome in _FINISHED:
            self._e2e.observe(seconds)

    def request_used(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """It ended with all its choices; what they add up to."""
        self._prompt_tokens.observe(num_prompt_tokens)
        self._generation_tokens.observe(num_output_tokens)

    def tokens_left(self, journey: Journey, num_tokens: int, now: float) -> None:
        """Tokens of a choice leave together; those of its first output have no gap between."""
        gap = journey.took(num_tokens, now)
        if gap is not None:
            self._itl.observe(gap / num_tokens, count=num_tokens)
        elif num_tokens and journey.timing is not None and journey.ttft_seconds is not None:
            self._ttft.observe(journey.ttft_seconds, journey.timing.prefill_path)
            had_transfer = journey.timing.remote is not None
            for part, seconds in journey.parts().items():
                # Choices without one would be all that a quantile over transfers shows.
                if had_transfer or part != "transfer":
                    self._ttft_parts.observe(seconds, part)

    def choice_ended(self, journey: Journey) -> None:
        """A choice ended with stop or length."""
        tpot = journey.tpot_seconds
        if tpot is not None:
            self._tpot.observe(tpot)
        if self._ttft_target is None and self._itl_target is None:
            return
        met_ttft = _is_met(journey.ttft_seconds, self._ttft_target)
        met_itl = _is_met(tpot, self._itl_target)
        if met_ttft:
            met = "both" if met_itl else "itl_missed"
        else:
            met = "ttft_missed" if met_itl else "neither"
        self._by_target.labels(self.role, met).inc()

    # The router.

    def decided(self, reason: str) -> None:
        """A request was sent as the router decided."""
        self._decisions.labels(self.role, reason).inc()

    def decision_took(self, seconds: float) -> None:
        """How long the router took to choose."""
        self._decision_seconds.observe(seconds)

    def first_token_came(self, reason: str, predicted_seconds: float, seconds: float) -> None:
        """How a router's prediction turned out."""
        self._ttft_ratio.observe(seconds / predicted_seconds, reason)
        self._predicted.labels(self.role, reason).inc(predicted_seconds)
        self._actual.labels(self.role, reason).inc(seconds)

    def replayed(self, reason: str, outcome: str) -> None:
        """It is known what became of a choice that was without a worker.

        Args:
            reason: What befell its worker, lost or moved.
            outcome: resumed (a worker answered with what came next), complete (nothing was left to
                do), failed (the client was told so) or aborted (the client left meanwhile).
        """
        self._replays.labels(self.role, reason, outcome).inc()

    def refused(self, reason: str) -> None:
        """A worker refused a request for want of room."""
        self._refusals.labels(self.role, reason).inc()

    def session_lost(self, pool: str) -> None:
        """A session ended though Serve lists its worker."""
        self._sessions_lost.labels(self.role, pool).inc()


def _is_met(seconds: float | None, target: float | None) -> bool:
    return seconds is None or target is None or seconds <= target

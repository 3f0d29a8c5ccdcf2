"""Prometheus metrics that every process may count, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_RATIOS = (0.25, 0.5, 0.8, 1.0, 1.25, 2, 4)
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """One process's counters.

    Args:
        role: Label on every sample: ``ingress`` or the worker's role.
    """

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        self._role = role
        self._requests = self._counter(
            "antiphon_requests", "Requests that ended here, by outcome.", "outcome"
        )
        self._fallbacks = self._counter(
            "antiphon_prefill_fallbacks",
            "Prompts computed by the decode worker because the prefill pool failed.",
            "reason",
        )
        self._prefill_attempts = self._counter(
            "antiphon_prefill_attempts",
            "Prefill workers asked for a prompt, by outcome.",
            "outcome",
        )
        self._replays = self._counter(
            "antiphon_replays",
            "Requests that went on at another worker after theirs was lost.",
            "reason",
        )
        self._refusals = self._counter(
            "antiphon_refusals", "Requests refused for want of capacity.", "reason"
        )

        self._engine_ttft = Histogram(
            "antiphon_engine_time_to_first_token_seconds",
            "From a request's arrival at its decode worker to its first token, by who computed it.",
            ["role", "path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._prewarm_failures = self._counter(
            "antiphon_handoff_prewarm_failures",
            "Links that could not be made before a request wanted them.",
            "reason",
        )
        self._decode_wait = Histogram(
            "antiphon_decode_wait_seconds",
            "From a prompt's KV being complete to the step that gives its first token.",
            ["role", "path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._decisions = self._counter(
            "antiphon_router_decisions", "Requests sent to workers, by why there.", "reason"
        )
        self._ttft_ratio = Histogram(
            "antiphon_router_time_to_first_token_ratio",
            "Time from a router's decision to the first token, over what it had predicted.",
            ["role", "reason"],
            buckets=_RATIOS,
            registry=self.registry,
        )
        self._decode_step = Gauge(
            "antiphon_decode_step_seconds",
            "A worker's own measure of its decode steps, smoothed.",
            ["role", "worker"],
            registry=self.registry,
        )

    def first_token(self, path: str, seconds: float) -> None:
        """Record a decode worker's own time to first token."""
        self._engine_ttft.labels(self._role, path).observe(seconds)

    def prewarm_failed(self, reason: str) -> None:
        """Count a link that could not be made before a request wanted it."""
        self._prewarm_failures.labels(self._role, reason).inc()

    def decode_waited(self, path: str, seconds: float) -> None:
        """Record how long a request with a complete prompt waited for its first decode step."""
        self._decode_wait.labels(self._role, path).observe(seconds)

    def decided(self, reason: str) -> None:
        """Count a request that was sent as the router decided."""
        self._decisions.labels(self._role, reason).inc()

    def first_token_came(self, reason: str, predicted_seconds: float, seconds: float) -> None:
        """Record how a router's prediction turned out."""
        self._ttft_ratio.labels(self._role, reason).observe(seconds / predicted_seconds)

    def decode_step(self, worker: str, seconds: float) -> None:
        """Record what a worker says of its steps."""
        self._decode_step.labels(self._role, worker).set(seconds)

    def forget_worker(self, worker: str) -> None:
        """Drop the gauges of a worker that is gone."""
        self._decode_step.remove_by_labels({"role": self._role, "worker": worker})

    def request_ended(self, outcome: str) -> None:
        """Count a request by how it ended: a finish reason, aborted, refused or failed."""
        self._requests.labels(self._role, outcome).inc()

    def fell_back(self, reason: str) -> None:
        """Count a prompt that the decode worker had to compute itself."""
        self._fallbacks.labels(self._role, reason).inc()

    def prefill_attempt(self, outcome: str) -> None:
        """Count how one prefill worker answered for one prompt."""
        self._prefill_attempts.labels(self._role, outcome).inc()

    def replayed(self, reason: str) -> None:
        """Count a request that was sent again, with the tokens that it had."""
        self._replays.labels(self._role, reason).inc()

    def refused(self, reason: str) -> None:
        """Count a request that was refused as busy."""
        self._refusals.labels(self._role, reason).inc()

    def count(self, name: str, **labels: str) -> float:
        """Read a counter; 0 if nothing was counted under these labels."""
        return self.registry.get_sample_value(name, {"role": self._role, **labels}) or 0.0

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, ["role", label], registry=self.registry)

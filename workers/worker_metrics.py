"""What a worker counts as it happens, beside what is read of its engine and its links."""

from antiphon.messages import WorkerCard
from antiphon.metrics import Metrics
from antiphon.workers.prefill_outcome import Outcome


class WorkerMetrics(Metrics):
    """One worker's metrics; counted on its event loop."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self._make_request_metrics()
        self._make_prefill_metrics()
        self._draining = self.gauge(
            "antiphon_draining", "1 if the worker takes nothing new and will stop."
        ).labels(role)
        self._info = self.gauge(
            "antiphon_worker_info", "Who this is; 1.", "worker", "incarnation", "node", "model",
            "version",
        )  # fmt: skip

    def _make_request_metrics(self) -> None:
        self._requests = self.counter(
            "antiphon_worker_requests",
            "Requests to generate that ended here.",
            "outcome",
            values=("stop", "length", "aborted", "refused", "failed", "moved"),
        )
        self._refusals = self.counter(
            "antiphon_worker_refusals",
            "Requests, and prompts of decode workers, refused here for want of room.",
            "reason",
            values=("queue_full", "no_headroom", "no_link", "draining"),
        )
        self._session_refusals = self.counter(
            "antiphon_session_refusals",
            "Clients that got no session here.",
            "reason",
            values=("key", "protocol", "silent", "http"),
        )

    def _make_prefill_metrics(self) -> None:
        self._fallbacks = self.counter(
            "antiphon_prefill_fallbacks",
            "Prompts computed by the decode worker because no prefill worker delivered.",
            "reason",
            values=(
                *(outcome for outcome in Outcome if outcome is not Outcome.COMPLETE),
                "shunned",
            ),
        )
        self._prefill_attempts = self.counter(
            "antiphon_prefill_attempts",
            "Prefill workers asked for a prompt.",
            "outcome",
            values=tuple(Outcome),
        )
        self._received_tokens = self.counter(
            "antiphon_received_tokens", "Prompt tokens whose KV came over a link."
        ).labels(self.role)
        self._transfer_seconds = self.histogram(
            "antiphon_handoff_transfer_seconds",
            "From a complete transfer's first segment to all KV being in place.",
        )
        self._tail_seconds = self.counter(
            "antiphon_handoff_tail_seconds",
            "Of that, what came after the prompt's last step, summed.",
        ).labels(self.role)

    def introduce(self, card: WorkerCard, model: str, version: str) -> None:
        """Say who this is."""
        labels = (card.replica_id, card.incarnation, card.node, model, version)
        self._info.labels(self.role, *labels).set(1)

    def request_ended(self, outcome: str) -> None:
        """By how a request ended: a finish reason, aborted, refused, moved or failed."""
        self._requests.labels(self.role, outcome).inc()

    def fell_back(self, reason: str) -> None:
        """The decode worker has to compute a prompt itself."""
        self._fallbacks.labels(self.role, reason).inc()

    def prefill_attempt(self, outcome: str) -> None:
        """How one prefill worker answered for one prompt."""
        self._prefill_attempts.labels(self.role, outcome).inc()

    def received(self, num_tokens: int) -> None:
        """KV of so many tokens came, be the transfer complete or not."""
        self._received_tokens.inc(num_tokens)

    def transferred(self, seconds: float, tail_seconds: float) -> None:
        """A transfer is complete: since its first segment, and since all was computed."""
        self._transfer_seconds.observe(seconds)
        self._tail_seconds.inc(tail_seconds)

    def refused(self, reason: str) -> None:
        """A request, or a decode worker's prompt, was refused as busy."""
        self._refusals.labels(self.role, reason).inc()

    def session_refused(self, reason: str) -> None:
        """A client got no session."""
        self._session_refusals.labels(self.role, reason).inc()

    def drain(self) -> None:
        """The worker takes nothing new from now on."""
        self._draining.set(1)

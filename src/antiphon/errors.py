"""Every error this project raises on purpose, by what the caller should do.

* AntiphonError
  x RequestError              the client can fix it           -> HTTP 4xx
    - InvalidParameterError   a field has a bad value         -> 400, names the field
    - PromptTooLongError      prompt exceeds the context      -> 400, both lengths
    - UnknownModelError       no such model is served         -> 404
    - UnknownRequestError     no ingress remembers it         -> 404
  x CapacityError             retry later or elsewhere        -> HTTP 503 + Retry-After
    - WorkerBusyError         a worker refused, with a reason
      . WorkerDrainingError   because it will stop
    - ServiceStoppingError    the whole endpoint is being stopped
    - NoWorkerError           no worker of a needed role is connected
  x HandoffError              KV did not arrive               -> next rung: compute it locally
    - LinkBrokenError         the peer or the connection died
    - LayoutMismatchError     sender and receiver disagree about model or KV layout
    - SegmentRejectedError    a stale, corrupt or unknown segment
    - PrefillFailedError      a prefill worker did not deliver; says how it failed
  x ConfigError               the operator can fix it         -> refuse to start
    - UnsupportedModelError   the model family cannot be served
  x StepAbandonedError      nobody waits for the step any more -> the engine drops it
  x WorkerLostError           the worker that owned the request died -> replayed; 503 if nobody is
                              left to take it, 502 if that happened too often
    - WorkerMovedError        it is being stopped and gave the request back -> replayed, or 503
  x TelemetryGapError         a worker's telemetry skipped a message -> reconnect for a snapshot
"""

from typing import Any


class AntiphonError(Exception):
    """Base class; catch this at process boundaries only."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy must not go through the constructor: some take more than the message, which is all
        # that ``args`` holds.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[AntiphonError], args: tuple[Any, ...]) -> AntiphonError:
    return kind.__new__(kind, *args)


class RequestError(AntiphonError):
    """The client sent something that cannot be served as it is."""


class InvalidParameterError(RequestError):
    """A request field has a value outside its range."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(f"{parameter}: {message}")
        self.parameter = parameter


class PromptTooLongError(RequestError):
    """Prompt plus at least one output token exceed the model's context."""

    def __init__(
        self, num_prompt_tokens: int, max_context_tokens: int, parameter: str = "prompt"
    ) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens, but the context of this deployment holds "
            f"{max_context_tokens} tokens and at least one of them must be left for the output"
        )
        self.parameter = parameter


class UnknownModelError(RequestError):
    """The request names a model that this endpoint does not serve."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"the model {model!r} does not exist; this endpoint serves {served!r}")


class UnknownRequestError(RequestError):
    """Somebody asks for the timeline of a request that no ingress remembers."""

    CODE = "request_not_found"  # tells the 404 from that of a path that is not served


class CapacityError(AntiphonError):
    """A bounded resource is used up for now.

    ``retry_after_seconds`` of a worker's refusal says when that worker may be asked again; of what
    a client is to see, when the client may come again (``antiphon.router.retry_after``).
    """

    retry_after_seconds: float = 1.0


class WorkerBusyError(CapacityError):
    """A worker refused a request at once instead of queueing it without bound."""


class WorkerDrainingError(WorkerBusyError):
    """A worker that will stop refused a request; any other may take it."""


class ServiceStoppingError(CapacityError):
    """The endpoint is being stopped; what it could not finish in time ends with this."""


class NoWorkerError(CapacityError):
    """No worker of a role that the request needs is connected."""


class HandoffError(AntiphonError):
    """A KV hand-off did not complete."""


class LinkBrokenError(HandoffError):
    """The link's peer died, timed out or closed the connection."""


class LayoutMismatchError(HandoffError):
    """Sender and receiver disagree about the model, the KV layout or the protocol.

    Args:
        reason: About what: version, model, layout or dtype; fit for a metric's label.
        message: The same in words.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SegmentRejectedError(HandoffError):
    """A segment failed its checks; nothing was written to the cache."""


class PrefillFailedError(HandoffError):
    """One prefill worker did not deliver the KV of a prompt.

    Args:
        outcome: How it failed, fit for a metric's label.
        message: The same in words.
    """

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class ConfigError(AntiphonError):
    """The configuration, or the model it names, cannot be used; the message says what to change."""


class UnsupportedModelError(ConfigError):
    """The model family cannot be served by this engine."""


class StepAbandonedError(AntiphonError):
    """Every request of the step in progress was aborted; what it computed is of no use."""


class WorkerLostError(AntiphonError):
    """The worker that owned a request died, or failed, before the request was finished."""


class WorkerMovedError(WorkerLostError):
    """A worker that is being stopped gave a request back; it can go on elsewhere."""


class TelemetryGapError(AntiphonError):
    """A worker's telemetry cannot be followed any more; its view was dropped."""

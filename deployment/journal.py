"""What an ingress remembers of its requests, and the spans that it makes of them.

    began -> open: its journeys grow -> ended -> timeline kept, spans ended
                                                     | more than may be kept
                                                     +--> the oldest are forgotten

A request is open in memory anyway; one that has ended keeps about 1.5 kB for each choice.
"""

import time
from collections import deque
from collections.abc import Sequence

from antiphon.deployment.http_planning import Body
from antiphon.deployment.journey import Journey
from antiphon.deployment.request_spans import begin_choices, end_request
from antiphon.deployment.request_timeline import RequestTimeline, choice_timeline
from antiphon.messages import TraceContext
from antiphon.tracing import RequestSpan, Tracing

_UNAUTHORIZED = 401
MAX_FOUND = 16  # requests of one id that are told of


class OpenRequest:
    """One generation request that has not ended."""

    def __init__(self, request_id: str, path: str, arrived_at: float) -> None:
        self.request_id = request_id
        self.path = path
        self.arrived_at = arrived_at  # ``time.monotonic``
        self.span: RequestSpan | None = None
        self.journeys: Sequence[Journey] = ()
        self._arrived_on = time.time() - (time.monotonic() - arrived_at)

    def planned(self, body: Body, journeys: Sequence[Journey]) -> None:
        """It is valid, and its choices are known."""
        self.journeys = journeys
        if self.span is not None:
            begin_choices(self.span, body, journeys)

    def timeline(self, ingress: str, outcome: str | None) -> RequestTimeline:
        """Tell of it as it stands."""
        return RequestTimeline(
            request_id=self.request_id,
            ingress=ingress,
            trace_id=self.span.trace_id if self.span is not None else None,
            path=self.path,
            arrived_at=self._arrived_on,
            seconds=time.monotonic() - self.arrived_at,
            outcome=outcome,
            choices=[choice_timeline(journey) for journey in self.journeys],
        )


class Journal:
    """The requests of one ingress; on its event loop.

    Args:
        tracing: Where spans go; None: there are none.
        ingress: Its replica id.
        max_timelines: Choices that have ended and are remembered; a request without one counts as
            one.
    """

    def __init__(
        self, tracing: Tracing | None = None, ingress: str = "", max_timelines: int = 0
    ) -> None:
        self._tracing = tracing
        self._ingress = ingress
        self._max_timelines = max_timelines
        self._num_timelines = 0
        self._open: dict[OpenRequest, None] = {}
        self._ended: deque[RequestTimeline] = deque()

    def began(self, path: str, context: TraceContext, arrived_at: float) -> OpenRequest:
        """A request has come, from a client that may have a trace already."""
        request = OpenRequest(context.request_id, path, arrived_at)
        if self._tracing is not None:
            attributes = {"http.request.method": "POST", "http.route": path, "url.path": path}
            request.span = self._tracing.begin(f"POST {path}", context, arrived_at, attributes)
        self._open[request] = None
        return request

    def ended(self, request: OpenRequest, outcome: str, status: int) -> None:
        """It was answered, or left alone; ``status`` is 0 if there was none.

        Who has no key leaves nothing: neither could push out what others did, nor fill a collector.
        A span that is never ended is never exported.
        """
        del self._open[request]
        if status == _UNAUTHORIZED:
            return
        if request.span is not None:
            end_request(request.span, request.journeys, outcome, status)
        if self._max_timelines:
            self._keep(request.timeline(self._ingress, outcome))

    def find(self, request_id: str) -> list[RequestTimeline]:
        """What is known under an id, newest first."""
        now_open = [one for one in reversed(self._open) if one.request_id == request_id]
        found = [one.timeline(self._ingress, None) for one in now_open[:MAX_FOUND]]
        found += [one for one in reversed(self._ended) if one.request_id == request_id]
        return found[:MAX_FOUND]

    def _keep(self, timeline: RequestTimeline) -> None:
        self._ended.append(timeline)
        self._num_timelines += _weight(timeline)
        while self._num_timelines > self._max_timelines and len(self._ended) > 1:
            self._num_timelines -= _weight(self._ended.popleft())


def _weight(timeline: RequestTimeline) -> int:
    return max(1, len(timeline.choices))

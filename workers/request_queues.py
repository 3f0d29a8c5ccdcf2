"""The requests of one worker: who waits, who computes, and how many there are of each.

A request stands in the queue of its status, in the order in which it came there, and in none once
it is FINISHED. A preempted one waits before all others.
"""

from collections import OrderedDict
from collections.abc import Iterator

from antiphon.workers.request import PrefillPath, Request, RequestStatus

_Queue = OrderedDict[str, Request]


class RequestQueues:
    """Iterates over the requests that are not finished, oldest first."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        places = [status for status in RequestStatus if status is not RequestStatus.FINISHED]
        self._queues: dict[RequestStatus, _Queue] = {status: OrderedDict() for status in places}

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def __reversed__(self) -> Iterator[Request]:
        return reversed(self._requests.values())

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Whose turn is first comes first."""
        return tuple(self._queues[RequestStatus.WAITING].values())

    @property
    def running(self) -> tuple[Request, ...]:
        """Oldest first."""
        return tuple(self._queues[RequestStatus.RUNNING].values())

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet."""
        return len(self._queues[RequestStatus.WAITING])

    @property
    def num_running(self) -> int:
        """Requests that compute in steps."""
        return len(self._queues[RequestStatus.RUNNING])

    @property
    def num_awaiting_kv(self) -> int:
        """Requests whose blocks are reserved for KV from elsewhere."""
        return len(self._queues[RequestStatus.AWAITING_KV])

    @property
    def num_streams(self) -> int:
        """Requests that sample: waiting, awaiting KV or running."""
        return sum(not r.is_prefill_only for r in self)

    @property
    def num_decoding(self) -> int:
        """Requests that get a token in every step."""
        return sum(r.is_decoding for r in self.running)

    @property
    def prompts(self) -> list[Request]:
        """Whose prompts are yet to be computed here, begun ones first; none that others will."""
        waiting = (r for r in self.waiting if r.path is not PrefillPath.REMOTE)
        return [r for r in (*self.running, *waiting) if not r.is_decoding]

    def get(self, request_id: str) -> Request | None:
        """A request that is not finished."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Let a new request wait.

        Raises:
            ValueError: The id is in use.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request_id: {request.request_id!r} is already in use on this worker")
        self._requests[request.request_id] = request
        self._queues[RequestStatus.WAITING][request.request_id] = request

    def move(self, request: Request, status: RequestStatus) -> None:
        """Give a request another status, and the place that goes with it."""
        del self._queues[request.status][request.request_id]
        request.status = status
        if status is RequestStatus.FINISHED:
            del self._requests[request.request_id]
        else:
            self._queues[status][request.request_id] = request

    def put_back(self, request: Request) -> None:
        """Let a request that ran wait again, before all others."""
        self.move(request, RequestStatus.WAITING)
        self._queues[RequestStatus.WAITING].move_to_end(request.request_id, last=False)

    def check(self) -> None:
        """Assert that every request stands where its status says, and nowhere else."""
        assert sum(map(len, self._queues.values())) == len(self)
        for request in self:
            assert self._queues[request.status][request.request_id] is request
